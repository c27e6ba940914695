"""What a recipe gives to rehearse: itself, or the stages of a pipeline that train or sample."""

from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.cli import RECIPE_VERBS
from megatron_r1.commands.rehearsal_checks import check_full_size
from megatron_r1.commands.rehearsal_jobs import rehearsal_jobs
from megatron_r1.commands.rehearse import IMPLIED_BY_VERB, _miniature_identity
from megatron_r1.rehearse.settings import RehearsalConfig

R1 = Path("examples/deepseek_r1")
LAPTOP = Path("examples/laptop")
LAPTOP_SHAPES = {
    "stages.base.model.path": str(LAPTOP / "model"),
    "stages.qwen_base.model.path": "examples/distill/models/qwen2.5-math-1.5b",
    "stages.llama_base.model.path": "examples/distill/models/llama-3.1-8b",
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


def read(path, overrides=None, only=()):
    return rehearsal_jobs(str(path), overrides or {}, RECIPE_VERBS, IMPLIED_BY_VERB, only)


def test_every_stage_of_the_pipeline_has_its_verb_and_a_model():
    found = {job.name: job for job in read(R1 / "pipeline.yaml")}
    verbs = {name: job.verb for name, job in found.items()}
    assert len(verbs) == 11  # all but the evaluation
    assert verbs["r1_zero"] == verbs["all_scenarios_rl"] == "rl"
    assert verbs["cold_start_sft"] == "sft" and verbs["safety_labels"] == "sample"
    assert verbs["helpful_rm"] == verbs["safety_rm"] == "reward-model"
    assert found["helpful_rm"].config.model.head == "score"
    # Neither the base model nor what stages make of it is there yet.
    assert {job.config.model.path for job in found.values()} == {str(R1 / "model")}


def test_a_recipe_is_one_run():
    (job,) = read(R1 / "safety_rm.yaml", {"run.steps": 7})
    assert (job.name, job.verb, job.config.run.steps) == ("safety_rm", "reward-model", 7)
    assert job.config.model.head == "score"


def test_a_stage_without_any_model_is_named(tmp_path):
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text(
        "pipeline: {folder: runs/x}\n"
        "stages: {tune: {verb: sft, settings: {model: {path: nowhere}, sft: {data: d.jsonl}}}}\n"
    )
    with refused("stages.tune.model.path", Cause.NOT_FOUND, "nowhere"):
        read(recipe)


def test_chosen_stages_and_an_unknown_one():
    found = read(R1 / "pipeline.yaml", only=["sft_800k", "r1_zero"])
    assert [job.name for job in found] == ["r1_zero", "sft_800k"]
    with refused("rehearsal.stages", Cause.UNKNOWN, "sft_80k", "sft_800k"):
        read(R1 / "pipeline.yaml", only=["sft_80k"])


def test_what_a_pipeline_would_refuse_is_refused(tmp_path):
    """A stage whose settings cannot be read would otherwise be rehearsed with the defaults."""
    text = (R1 / "pipeline.yaml").read_text().replace("recipe: ", f"recipe: {R1.resolve()}/")
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text(text.replace("sft_800k.yaml", "sft_900k.yaml"))
    with refused("stages.sft_800k.recipe", Cause.NOT_FOUND, "sft_900k.yaml"):
        read(recipe)
    recipe.write_text(text.replace("sft: {data: ", "sft: {dat: "))
    with refused("stages.cold_start_sft.sft.dat", Cause.UNKNOWN, "sft.data"):
        read(recipe)


def test_the_laptops_pipeline_takes_the_shapes_that_its_functions_would_write():
    """Three of its models are made by functions, when it runs."""
    with refused("stages.base.model.path", Cause.NOT_FOUND):
        read(LAPTOP / "r1.yaml")
    found = {job.name: job.config.model.path for job in read(LAPTOP / "r1.yaml", LAPTOP_SHAPES)}
    assert found["r1"] == found["sft"] == str(LAPTOP / "model")
    assert found["llama_answers"] == LAPTOP_SHAPES["stages.llama_base.model.path"]


def test_an_evaluation_is_named():
    with refused("eval.benchmarks", Cause.UNSUPPORTED, "eval.yaml"):
        read(LAPTOP / "eval.yaml")


def test_a_recipe_without_what_its_verb_requires_is_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{path: {LAPTOP / 'model'}}}\ndata: {{task: chain_sum}}\n")
    with refused("run.folder", Cause.MISSING, "mine.yaml"):
        read(recipe)
    assert read(recipe, {"run.folder": "runs/x"})[0].verb == "rl"


def test_a_model_beside_the_pipelines_recipe_is_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "p.yaml").write_text(
        "pipeline: {folder: runs/x}\n"
        "stages: {tune: {verb: sft, settings: {model: {path: ${here}/model}, sft: {data: d}}}}\n"
    )
    (job,) = read(tmp_path / "p.yaml")
    assert job.config.model.path == str(tmp_path / "model")


def test_stages_that_are_equal_in_miniature_are_found():
    """The laptop's answers to held-out questions are sampled from models of one shape; other
    rewards are another rehearsal."""
    found = {job.name: job for job in read(LAPTOP / "r1.yaml", LAPTOP_SHAPES)}
    identities = {name: _miniature_identity(job, RehearsalConfig()) for name, job in found.items()}
    assert identities["base_answers"] == identities["sft_answers"]
    assert identities["r1_zero"] != identities["reasoning_rl"]
    assert len(set(identities.values())) < len(found)


def test_a_stage_of_the_pipeline_is_in_miniature_what_its_own_recipe_is():
    """So that to rehearse each recipe is to rehearse the pipeline."""
    for stage in read(R1 / "pipeline.yaml"):
        (alone,) = read(R1 / f"{stage.name}.yaml")
        assert _miniature_identity(stage, RehearsalConfig()) == _miniature_identity(
            alone, RehearsalConfig()
        ), stage


def test_an_environment_that_the_run_would_refuse_is_refused():
    recipe = "examples/agents/lookup.yaml"
    shape = {"model.path": LAPTOP_SHAPES["stages.qwen_base.model.path"]}
    for settings, key, cause in (
        ({"agents.environment": "lookups"}, "agents.environment", Cause.UNKNOWN),
        ({"agents.harness": "no_agents:run"}, "agents.environment", Cause.CONFLICT),
        ({"data.template": "plain"}, "data.template", Cause.CONFLICT),
    ):
        (job,) = read(recipe, shape | settings)
        with refused(key, cause):
            check_full_size(job.config, job.verb)
