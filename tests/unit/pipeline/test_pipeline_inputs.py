"""An input that changes while a stage reads it."""

from pathlib import Path

import pytest
from pipeline_world import World

from megatron_r1.pipeline import manifest
from megatron_r1.pipeline.pipeline_recipe import load_pipeline
from megatron_r1.pipeline.stages import PipelinePlan
from megatron_r1.pipeline.status import StageState, stage_status

RECIPE = """
pipeline: {folder: out}
stages:
  only: {verb: make, function: "tiny:join", arguments: {sources: [extra.txt]}}
"""


@pytest.mark.parametrize(("after", "state"), [("x\n", "DONE"), ("changed\n", "STALE")])
def test_a_stage_was_made_of_its_inputs_as_they_were_at_its_beginning(
    tmp_path, monkeypatch, after, state
):
    monkeypatch.chdir(tmp_path)
    World(tmp_path, RECIPE)
    plan = PipelinePlan.from_recipe(load_pipeline("p.yaml"), "p.yaml", Path("out"), 0, {})
    stage = plan.stages["only"]
    plan.folder_of("only").mkdir(parents=True)
    manifest.record_begin(plan, stage, (), None)
    (plan.folder_of("only") / "all.txt").write_text("x")
    (tmp_path / "extra.txt").write_text(after)
    manifest.record_finish(plan, stage, (), ["megatron-r1"])
    assert stage_status(plan, stage, {}).state is StageState[state]
