"""tools/bench algorithms: its figures worked out by hand, and what each algorithm is given."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_r1 import config as configuration
from megatron_r1.commands import cli
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.pipeline_recipe import load_pipeline
from megatron_r1.pipeline.stages import PipelinePlan
from tools.bench import algorithms
from tools.bench.algorithms import CHANGED_SETTINGS, CHOICES, recipe

ROOT = Path(__file__).parents[3]


def metrics(accuracies, filtered=()) -> list[dict]:
    filtered = list(filtered) or [0] * len(accuracies)
    return [
        {"accuracy": value, "time/step": 9.0 if step == 0 else step, "groups/filtered": over}
        for step, (value, over) in enumerate(zip(accuracies, filtered, strict=True))
    ]


def evaluation(step: int, value: float) -> dict:
    ends = {"interval/pass@1/low": value - 0.1, "interval/pass@1/high": value + 0.1}
    return {"step": step, "eval/pass@1": value, **ends}


def a_run(until: int | None, heldout: float, answers: float = 256) -> dict:
    return {
        "steps_until_target": until,
        "heldout": heldout,
        "heldout_before": 0.2,
        "seconds_per_step": 4.0,
        "answers_per_step": answers,
    }


@pytest.mark.parametrize(
    ("accuracies", "step"),
    [
        ([0.9, 0.9, 0.9], 3),
        ([0.5, 0.9, 0.9, 0.9], 4),  # 0.77, then 0.9
        ([0.8, 0.8, 0.8], 3),  # exactly
        ([0.7, 0.95, 0.7, 0.7, 0.95], None),  # 0.78 is the best
        ([1.0, 1.0], None),  # fewer steps than the mean is over
        ([], None),
    ],
)
def test_the_target_is_reached_when_the_mean_of_three_steps_is(accuracies, step):
    assert algorithms.steps_until(accuracies) == step


def test_a_lucky_step_alone_reaches_nothing():
    assert algorithms.steps_until([0.2, 1.0, 0.2, 0.2, 0.2]) is None


def test_a_runs_figures_are_those_of_its_lines():
    lines = metrics([0.2, 0.8, 0.8, 0.9, 0.9], filtered=[0, 0, 4, 8, 3])
    found = algorithms.run_figures(lines, [evaluation(5, 0.85), evaluation(0, 0.25)], 16, 8)
    assert found["steps"] == 5 and found["steps_until_target"] == 4
    assert (found["heldout_before"], found["heldout"]) == (0.25, 0.85)
    assert found["heldout_interval"] == pytest.approx([0.75, 0.95])
    assert found["seconds_per_step"] == 2.5  # of 1, 2, 3, 4: the first step's 9 does not count
    assert found["answers_per_step"] == 8 * (16 + 3)


def test_the_table_tells_seeds_that_never_came_there():
    rows = {
        "one": algorithms.table_row([a_run(14, 0.9)]),
        "all": algorithms.table_row([a_run(10, 0.8), a_run(14, 0.9)]),
        "some": algorithms.table_row([a_run(10, 0.8), a_run(None, 0.6)]),
        "none": algorithms.table_row([a_run(None, 0.3, 304), a_run(None, 0.2)]),
    }
    steps = {name: cells["steps"] for name, cells in rows.items()}
    assert steps == {
        "one": "14", "all": "12.0 ± 2.8", "some": "10.0 in 1 of 2 seeds", "none": "never",
    }  # fmt: skip
    assert rows["all"]["held-out"] == "85.0% ± 7.1" and rows["one"]["held-out"] == "90.0%"
    assert rows["none"]["answers"] == "280"


def test_the_page_shows_its_figures_and_the_reasons_of_those_that_ran():
    result = {
        "packages": {"torch": "1.2.3"},
        "steps": 40,
        "responses": 256,
        "seeds": [0, 1],
        "runs": {"grpo": {"0": a_run(14, 0.9)}, "gspo": {"0": a_run(None, 0.5)}},
    }
    text = algorithms.as_page(result, cores=3)
    for shown in ("| `grpo` | 14 | 90.0% | 256 |", "| `gspo` | never |", "3 cores", "20.0%"):
        assert shown in text
    assert CHOICES["gspo"].why in text and CHOICES["ppo"].why not in text


@pytest.fixture
def plan(tmp_path, monkeypatch) -> PipelinePlan:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "bench.yaml"
    file.write_text(yaml.safe_dump(recipe(7)))
    options = ["pipeline", str(file), "--pipeline.folder", str(tmp_path / "out")]
    assert cli.main([*options, "--pipeline.status", "true"]) == 0
    return PipelinePlan.from_recipe(
        load_pipeline(file, {"pipeline.folder": "out"}), file, tmp_path / "out", 0
    )


def test_every_algorithm_runs_from_one_base_model_on_as_many_answers_and_updates(plan):
    assert set(CHANGED_SETTINGS) <= set(CHOICES) == set(ALGORITHM_NAMES)
    graph = StageGraph(plan.stages)
    assert graph.upstream["on_policy_distillation"] == ("base", "grpo")
    demo = configuration.load_recipe(ROOT / "examples/laptop/r1_zero.yaml")
    for name, choice in CHOICES.items():
        assert "base" in graph.upstream[name]
        config = plan.config(plan.stages[name])
        assert config.rl.algorithm == name and config.run.steps == 7
        for key in ("prompts_per_rollout", "group_size", "minibatches"):
            assert getattr(config.rl, key) == getattr(demo.rl, key), (name, key)
        for section in ("data", "rollout", "rewards", "optimizer"):
            assert getattr(config, section) == getattr(demo, section), (name, section)
        assert bool(choice.settings) == bool(choice.why), name
    assert plan.config(plan.stages["gspo"]).rl.ratio_level == "sequence"
    assert plan.config(plan.stages["ppo"]).critic.warmup_steps == 2


def test_runs_that_are_not_done_are_left_out(tmp_path):
    place = tmp_path / "seed_3" / "grpo"
    place.mkdir(parents=True)
    config = configuration.load_recipe(ROOT / "examples/laptop/r1_zero.yaml")
    (place / "config.yaml").write_text(configuration.dump_recipe(config))
    lines = {"metrics": metrics([0.9] * 4), "evaluations": [evaluation(0, 0.2), evaluation(4, 0.9)]}
    for name, written in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in written)
        (place / f"{name}.jsonl").write_text(text)
    stages = {name: {"by_seed": {"3": {"state": "pending"}}} for name in CHOICES}
    stages["grpo"] = {"by_seed": {"3": {"state": "done"}}}
    stages["ppo"] = {"by_seed": {"3": {"state": "unfinished"}}}
    found = algorithms._collect_figures(tmp_path, {"stages": stages})
    assert found["responses"] == 256 and list(found["runs"]) == ["grpo"]
    assert found["runs"]["grpo"]["3"]["steps_until_target"] == 3
