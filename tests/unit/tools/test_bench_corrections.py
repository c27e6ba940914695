"""tools/bench corrections: its figures worked out by hand, what each cell is given, and which runs
are made."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_r1 import config as configuration
from megatron_r1.commands import rl
from megatron_r1.controller.rollouts import step_sampler
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from tools.bench.corrections import comparison, figures, runs
from tools.bench.corrections.cells import MISMATCH, NONE, PARTS, TASKS, Part

CELLS = [(part, cell) for part, of in PARTS.items() for cell in of.cells]
OURS = ("engine_mask", "importance_cap", "kl_estimator", "reward_normalization", "truncated")


def a_run(heldout: float, until: int | None = None, **more) -> dict:
    made = {"heldout": heldout, "steps": 24, "steps_until_target": until, "heldout_before": 0.15}
    about = {"gap": 2e-3, "truncated": 0.0, "core_seconds": 18.0, "date": "2026-01-02"}
    return {**made, **about, "commit": "abcd0123", **more}


def test_differences_are_of_the_seeds_that_both_have():
    first = {"0": a_run(0.5), "1": a_run(0.9), "2": a_run(0.1)}
    cell = {"1": a_run(0.8), "2": a_run(0.3), "7": a_run(1.0)}
    found = figures.paired_differences(cell, first, lambda run: run["heldout"])
    assert found == pytest.approx([-0.1, 0.2])


def test_a_run_that_never_reaches_the_target_counts_one_step_more_than_it_has():
    assert figures.steps_to_target(a_run(0.9, 7)) == 7 and figures.steps_to_target(a_run(0.9)) == 25


def test_a_row_by_hand():
    first = {str(seed): a_run(value, 10) for seed, value in enumerate((0.8, 0.8, 0.39, 0.4))}
    cell = {str(seed): a_run(0.9, 12, masked=0.25) for seed in range(4)}
    of_first, of_cell = figures.table_row(first, first), figures.table_row(cell, first)
    assert of_first[0].startswith("59.8 [") and of_first[1] == of_first[3] == of_first[5] == ""
    # Clopper and Pearson of 1 of 4; below 40%, 0.4 is not
    assert of_first[4] == "1 of 4 [1, 81]"
    assert of_cell[0] == "90.0 [90.0, 90.0]" and of_cell[1].startswith("+30.2 [")
    assert of_cell[2] == "12.0 [12.0, 12.0]" and of_cell[3] == "+2.0 [+2.0, +2.0]"
    assert of_cell[4] == "0 of 4 [0, 60]" and of_cell[5] == "25.0%"


def test_cells_with_too_few_seeds_are_left_out_and_parts_without_their_first():
    many, few = {str(seed): a_run(0.5) for seed in range(3)}, {"0": a_run(0.5)}
    made = {
        "bf16": {NONE: many, "token": few, "sequence": many},
        "moe": {NONE: few, "token": many, "sequence": many},
        "kl": {"k3": many, "k2": few},
    }
    assert comparison.shown_runs(made, 3) == {"bf16": {NONE: many, "sequence": many}}


def test_the_page_shows_every_cell_and_what_it_comes_from():
    many = {str(seed): a_run(0.5, 20) for seed in range(10)}
    made = {"stale": dict.fromkeys(PARTS["stale"].cells, many)}
    text = figures.as_page(made, {"torch": "1.2.3"}, cores=3)
    assert [f"| `{cell}` | 50.0 [50.0, 50.0] |" in text for cell in made["stale"]] == [True] * 4
    for shown in (
        "abcd0123",
        "2026-01-02",
        "torch 1.2.3",
        "3 cores",
        "40 runs, 10 seeds",
        "18 CPU",
    ):
        assert shown in text
    assert TASKS["moe"].about not in text, "no part of it ran"


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("1,7-8", [1, 7, 8])]
)
def test_seeds(text, seeds):
    assert comparison.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1"])
def test_seeds_that_are_none(text):
    with pytest.raises(SystemExit, match="--seeds"):
        comparison.parse_seeds(text)


@pytest.mark.parametrize(("part", "cell"), CELLS)
def test_a_cell_is_a_recipe_that_differs_from_its_parts_first_in_corrections_alone(
    part, cell, tmp_path
):
    found = []
    for name in (next(iter(PARTS[part].cells)), cell):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(runs.cell_settings(part, name)["recipe"]))
        found.append(configuration.load_recipe(file))
    first, config = found
    changes = {"rl": {key: getattr(first.rl, key) for key in (*OURS, "routing_replay")}}
    assert config.with_changes(**changes) == first
    assert config.run.steps == 24 and config.data.task == "chain_sum"
    if part in ("bf16", "moe"):
        assert (config.rollout.dtype, config.model.dtype) == ("bfloat16", "float32")
    if cell in MISMATCH and cell not in (NONE, "importance_cap"):
        assert config.rl.engine_mask == cell
        if cell != "sequence":  # their sources' weights of the tokens that are kept
            assert config.rl.importance_cap == {"token": 5, "divergence": 20}[cell]


def test_what_is_planted_reaches_the_sampler_alone(monkeypatch):
    monkeypatch.setattr(runs, "StepSampler", lambda config, *more: (config, *more))
    upstream, config = rl.StepSampler, configuration.Config()
    with runs.plant_fault(Part("", engine_temperature=1.25), ""):
        sampled, more = rl.StepSampler(config, "more")
        assert sampled.rollout.temperature == 1.25 and config.rollout.temperature == 1.0
        assert sampled == config.with_changes(rollout={"temperature": 1.25}) and more == "more"
    assert rl.StepSampler is upstream
    with runs.plant_fault(Part(""), ""):
        assert rl.StepSampler is upstream


def test_the_kept_ids_are_not_asked_for_in_the_cell_that_lacks_them():
    part, asked = PARTS["cut"], []
    settings = dict.fromkeys(field.name for field in fields(RolloutSampling)) | {
        "sampling_mask": True
    }
    for cell in part.cells:
        with runs.plant_fault(part, cell):
            asked.append(step_sampler.RolloutSampling(**settings).sampling_mask)
    assert asked == [True, False] and step_sampler.RolloutSampling is RolloutSampling


class Recorded(runs.Study):
    """Writes the file of a run and makes none."""

    made: list

    def make(self, part, cell, seed):
        self.made.append((part, cell, seed))
        file = self.file(part, cell, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        made = {"settings": runs.cell_settings(part, cell), **a_run(0.5)}
        file.write_text(json.dumps(made))
        return 1.0


@pytest.fixture
def options(tmp_path, monkeypatch) -> argparse.Namespace:
    Recorded.made = []
    monkeypatch.setattr(comparison, "Study", Recorded)
    parser = argparse.ArgumentParser()
    comparison.add_options(parser)
    return parser.parse_args(["--folder", str(tmp_path), "--part", "limit", "--seeds", "0-1"])


def test_finished_runs_are_not_repeated_and_pairs_come_first(options, capsys):
    missing = Path(options.folder, "results/limit/truncated: mask/0.json")
    comparison.run(options)
    cells = list(PARTS["limit"].cells)
    assert Recorded.made == [("limit", cell, seed) for seed in (0, 1) for cell in cells]
    Recorded.made.clear()
    missing.unlink()
    comparison.run(options)
    assert Recorded.made == [("limit", "truncated: mask", 0)]
    options.fewest, options.show = 2, True
    assert "limit" in comparison.run(options)["runs"]
    assert "| `truncated: mask` | 50.0" in capsys.readouterr().out


def test_a_study_goes_on_from_the_figures_of_an_earlier_call(options, tmp_path):
    options.fewest = 2
    written = tmp_path / "corrections.json"
    written.write_text(json.dumps(comparison.run(options)))
    options.folder, options.seeds, options.results = tmp_path / "elsewhere", "0-2", written
    Recorded.made.clear()
    found = comparison.run(options)["runs"]
    assert Recorded.made == [("limit", cell, 2) for cell in PARTS["limit"].cells]
    assert found["limit"][NONE]["seeds"].keys() == {"0", "1", "2"}


def test_settings_are_written_once_for_all_seeds_of_a_cell():
    seeds = {str(seed): {"settings": {"task": "dense"}, **a_run(0.5)} for seed in range(2)}
    shared = runs.share_settings({"limit": {NONE: seeds}})
    assert shared == {
        "limit": {
            NONE: {
                "settings": {"task": "dense"},
                "seeds": {"0": a_run(0.5), "1": a_run(0.5)},
            }
        }
    }
    assert runs.spread_settings(shared) == {"limit": {NONE: seeds}}


def test_a_run_of_other_settings_is_refused(options, monkeypatch):
    comparison.run(options)
    cells = {NONE: {}, "truncated: mask": {"rl": {"truncated": "mask", "kl_beta": 0.5}}}
    monkeypatch.setitem(PARTS, "limit", Part("", cells=cells, settings=PARTS["limit"].settings))
    with pytest.raises(SystemExit, match=r"truncated: mask/0\.json: made with other settings"):
        comparison.run(options)


def test_the_figures_of_a_run_are_those_of_its_lines(tmp_path):
    lines = [
        {"accuracy": a, "time/step": 1.0, "groups/filtered": 0, "truncated": 0.5}
        | {"logprob_diff/mean": d, "clip_fraction": 0.0}
        for a, d in ((0.8, 0.1), (0.8, 0.2), (0.9, 0.3))
    ]
    ends = {"interval/pass@1/low": 0.1, "interval/pass@1/high": 0.9}
    evaluations = [{"step": 3, "eval/pass@1": 0.6, **ends}, {"step": 0, "eval/pass@1": 0.2, **ends}]
    for name, written in {"metrics": lines, "evaluations": evaluations}.items():
        text = "".join(json.dumps(line) + "\n" for line in written)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = runs.run_figures(tmp_path, {"prompts_per_rollout": 8, "group_size": 8})
    assert (found["heldout_before"], found["heldout"]) == (0.2, 0.6)
    assert found["steps_until_target"] == 3 and found["gap"] == pytest.approx(0.2)
    assert found["truncated"] == 0.5 and "masked" not in found
