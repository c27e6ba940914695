"""Recipes of pipelines, and the messages for mistakes in them before anything runs."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pipeline_world import RECIPE, World, recipe
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.children import free_port
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.pipeline_recipe import load_pipeline
from megatron_r1.pipeline.references import (
    escape_references,
    iter_references,
    substitute_references,
    unescape_references,
)
from megatron_r1.pipeline.stages import PipelinePlan, merge_settings
from megatron_r1.reporting.run_folder import RunFolder

TRAINING = recipe("training")
REFUSED = yaml.safe_load(Path(__file__).with_name("refused_pipelines.yaml").read_text())


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path)


@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/zero.yaml").write_text(
        "run: {steps: 5}\nrl: {group_size: 8}\ndata: {task: chain_sum, num_train: 8}\n"
        "rewards: {options: {helpful: {model: judge}}}\n"
    )
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    return World(tmp_path, TRAINING)


def plan_of(world, **overrides):
    recipe = load_pipeline("p.yaml", overrides)
    return PipelinePlan.from_recipe(recipe, "p.yaml", world.out, recipe.pipeline.seed)


@pytest.mark.parametrize(
    "text, value",
    [
        ("{a: {b: ${x}}}", {"a": {"b": "${x}"}}),
        ("{a: [${x.y}, '${z}/w'], b: 1}", {"a": ["${x.y}", "${z}/w"], "b": 1}),
        ("a: ${x} # ${y}", {"a": "${x}"}),
        ("a: |\n  cost: ${x}\n", {"a": "cost: ${x}\n"}),
    ],
)
def test_references_need_no_quotes_within_braces(text, value):
    assert unescape_references(yaml.safe_load(escape_references(text))) == value


def test_a_reference_that_is_all_of_a_text_keeps_its_type():
    settings = {"a": ["${seed}", "s${seed}"], "b": {"c": "plain"}}
    assert list(iter_references(settings)) == [("a[0]", "seed"), ("a[1]", "seed")]
    assert substitute_references(settings, lambda name: 7) == {"a": [7, "s7"], "b": {"c": "plain"}}


def test_settings_of_a_stage_come_from_four_places(training):
    plan = plan_of(training, **{"stages.zero.rl.group_size": 2})
    zero = plan.config(plan.stages["zero"])
    assert zero.model.dtype == "float32"  # defaults
    assert zero.run.steps == 5  # its recipe
    assert zero.rl.group_size == 2  # the command line, over 8 of its recipe, over 4 of defaults
    assert zero.rl.minibatches == 1
    assert zero.run.seed == 7 and zero.run.folder == str(training.out / "zero")
    settings = plan.resolve(plan.stages["zero"].settings, {"judge": "http://127.0.0.1:1"})
    assert settings["model"]["path"] == str(training.out / "base/hf")
    assert settings["rewards"]["options"]["helpful"] == {
        "model": "judge",
        "url": "http://127.0.0.1:1",
    }
    assert plan.resolve(plan.stages["base"].settings)["model"]["path"] == "./model"


def test_a_seed_that_a_stage_sets_is_its_own(training):
    plan = plan_of(training, **{"stages.base.run.seed": 1, "pipeline.seed": 2})
    assert [plan.stages[name].settings["run"]["seed"] for name in ("base", "zero")] == [1, 2]


def test_references_of_served_models_are_edges(training):
    graph = StageGraph(plan_of(training).stages)
    assert graph.order == ["base", "zero"] and graph.upstream["zero"] == ("base",)


def test_mappings_are_joined_key_by_key():
    under = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merge_settings(under, {"a": {"c": {"f": 3}}, "e": [2]}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 3}},
        "e": [2],
    }
    assert under == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


def test_stages_are_ordered_by_what_they_need_then_as_written(world):
    graph = StageGraph(plan_of(world).stages)
    assert graph.order == ["corpus", "other", "both", "last"]
    assert graph.needs("last") == {"corpus", "other", "both"}
    assert graph.depths() == {"corpus": 0, "other": 0, "both": 1, "last": 2}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["key"])
def test_a_mistake_is_named_before_anything_runs(world, case):
    world.write(case["recipe"])
    with refused(case["key"], Cause(case["cause"]), *case.get("shows", ())):
        world.load()
    assert world.calls == [] and not world.out.exists()


def test_an_adapter_is_an_output_of_a_stage_that_trains_one(world):
    world.write(
        "pipeline: {folder: out}\nstages:\n"
        "  tune: {verb: sft, settings: {model: {lora: {rank: 8}}}}\n"
        "  use: {verb: make, function: 'tiny:join', arguments: {sources: ['${tune.adapter}']}}\n"
    )
    assert StageGraph(plan_of(world).stages).upstream["use"] == ("tune",)


@pytest.mark.more
def test_a_function_may_be_imported_by_its_module(world):
    (world.path / "more.py").write_text("from tiny import count, join as joined\n")
    world.write(
        "pipeline: {folder: out}\nstages:\n"
        "  a: {verb: make, function: 'more:count', arguments: {lines: 3}}\n"
        "  b: {verb: make, function: 'more:joined', arguments: {sources: ['${a.data.jsonl}']}}\n"
    )
    assert world.run() == 0
    assert world.calls == ["a", "b"]


def test_files_are_found_where_references_to_the_recipe_and_the_seed_point(world):
    """A folder with the pipeline's own is no input: it changes with every stage."""
    files = "[${here}/extra_${pipeline.seed}.txt, ${pipeline.folder}/x.txt, ./, extra.txt]"
    world.write(RECIPE.replace('[${corpus.data.jsonl}, "${other}/data.jsonl", extra.txt]', files))
    (world.path / "extra_0.txt").write_text("")
    world.out.mkdir()
    (world.out / "x.txt").write_text("")
    plan = plan_of(world)
    assert plan.named_files(plan.stages["both"]) == [
        ("sources[0]", "${here}/extra_${pipeline.seed}.txt"),
        ("sources[3]", "extra.txt"),
    ]


def test_all_mistakes_are_named_at_once(world):
    """Each found by another look at the recipe."""
    world.write(
        """
pipeline: {folder: out}
stages:
  a: {verb: make, function: "tiny:count", arguments: {lines: 3, wrd: b}}
  b: {verb: sftt}
  c: {verb: sft, recipe: nope.yaml}
  d: {verb: make, function: "tiny:join", arguments: {sources: ["${aa.data.jsonl}"]}}
  e: {verb: make, function: "tiny:join", arguments: {sources: ["${c.hf}"]}}
"""
    )
    # The recipe that is not there is met first.
    shown = ("stages.c", "nope.yaml", "stages.a", "wrd", "stages.b", "sftt", "stages.d", "aa")
    with refused("stages.c.recipe", Cause.NOT_FOUND, *shown) as error:
        world.load()
    assert len(str(error.value).splitlines()) == 4


def test_commands_can_be_printed_where_the_data_is_not(training, capsys):
    (training.path / "train.jsonl").unlink()
    with refused("stages.base.sft.data", Cause.NOT_FOUND, "train.jsonl"):
        training.load()
    assert training.run("--pipeline.dry", "true") == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert "stages.base: sft.data: train.jsonl" in output.err
    assert lines[0] == "# base" and lines[1].endswith("megatron_r1 sft out/recipes/base.yaml")
    assert "--served-model-name judge" in lines[3] and lines[3].endswith("&")


def test_commands_are_not_printed_over_the_recipes_of_a_pipeline_at_work(training):
    assert training.run("--pipeline.dry", "true") == 0
    recipe = training.out / "recipes/zero.yaml"
    before = recipe.read_text()
    with RunFolder(training.out), refused("run.folder", Cause.BUSY, "out"):
        training.load("--pipeline.dry", "true")
    assert recipe.read_text() == before


def test_commands_name_the_ports_that_a_stage_began_with(training, capsys):
    port = free_port("127.0.0.1")
    (training.out / "zero").mkdir(parents=True)
    (training.out / "zero/begun.json").write_text(json.dumps({"ports": {"judge": port}}))
    assert training.run("--pipeline.dry", "true") == 0
    assert f"--port {port} " in capsys.readouterr().out
    assert f"url: http://127.0.0.1:{port}" in (training.out / "recipes/zero.yaml").read_text()


def test_a_cycle_is_named_in_order(world):
    world.write(
        "pipeline: {folder: out}\nstages:\n"
        "  a: {verb: make, function: 'tiny:join', arguments: {sources: [${b.all.txt}]}}\n"
        "  b: {verb: make, function: 'tiny:join', arguments: {sources: [${c.all.txt}]}}\n"
        "  c: {verb: make, function: 'tiny:join', arguments: {sources: [${a.all.txt}]}}\n"
    )
    with refused("stages", Cause.CONFLICT) as error:
        world.load()
    way = re.findall(r"\b[abc]\b", str(error.value).partition(":")[2])
    assert way[0] == way[-1] and set(way) == {"a", "b", "c"}
    # Each makes what the next needs.
    assert all((one, next_) in {("b", "a"), ("c", "b"), ("a", "c")}
               for one, next_ in pairwise(way))  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "key", "cause", "shown"),
    [
        ("stages.corpsu.lines", "3", "--stages.corpsu.lines", Cause.UNKNOWN, "corpus"),
        ("stages.corpus.lins", "3", "stages.corpus.arguments.lins", Cause.UNKNOWN, "lines"),
        ("rl.group_size", "3", "--rl.group_size", Cause.UNKNOWN, "--rl.group_size"),
        ("pipeline.onyl", "last", "pipeline.onyl", Cause.UNKNOWN, "pipeline.only"),
        ("pipeline.only", "lst", "pipeline.only", Cause.UNKNOWN, "last"),
        ("pipeline.only", "last", "pipeline.only", Cause.MISSING, "both is pending"),
    ],
)
def test_a_wrong_option_is_named(world, option, value, key, cause, shown):
    with refused(key, cause, shown):
        world.load(f"--{option}", value)
    assert world.calls == []


def test_under_torchrun_it_says_where_torchrun_belongs(world, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("torchrun", Cause.CONFLICT, "torchrun --no-python"):
        world.load()
