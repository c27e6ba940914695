"""examples/paper: its page from made-up reports, its recipe, its measures against hand counts."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from refusals import refused

from examples.paper import measure, rows, tables
from examples.paper.__main__ import RECIPE, main, needed_stages
from examples.paper.page import write_page
from examples.paper.tables import Results
from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.pipeline_recipe import MAKE, load_pipeline
from megatron_r1.pipeline.stages import PipelinePlan

ROOT = Path(__file__).parents[3]
SEEDS = ("0", "1", "2")
PUBLISHED = tables.load_tables()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def a_report(values: dict[str, list[float | None]], states: dict[str, str] | None = None) -> dict:
    """`stage.figure` → a value per seed (None: not there) as report.json has them."""
    stages: dict[str, dict] = {}
    for reference, by_seed in values.items():
        name, figure = tables.split(reference)
        runs = {seed: {"state": "done", "seconds": 60.0, "figures": {}} for seed in SEEDS}
        stage = stages.setdefault(name, {"figures": {}, "by_seed": runs})
        for seed, value in zip(SEEDS, by_seed, strict=True):
            stage["by_seed"][seed]["state"] = (states or {}).get(name, "done")
            if value is not None:
                stage["figures"][figure] = {}
                stage["by_seed"][seed]["figures"][figure] = {"value": value}
    return {"seeds": [0, 1, 2], "written": "2026-01-01", "stages": stages}


def page_of(tmp_path, values, states=None) -> str:
    write_page(tmp_path / "paper.md", PUBLISHED, Results(a_report(values, states)))
    return (tmp_path / "paper.md").read_text()


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(shown: str, row: str) -> list[str]:
    """The cells of a row after its title."""
    [line] = [line for line in shown.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def verdict(shown: str) -> tuple[str, str, str] | None:
    """(seeds in which it is so, the gap, what follows) of a section's comparison."""
    found = re.search(r"in (\d of \d) seeds \(by (\S+(?: ± \S+)?) points\): ([\w ]+)", shown)
    return found and found.groups()


SMALL = {"small_rl.accuracy": [0.40, 0.50, 0.60], "small_distilled.accuracy": [0.5, 0.7, 0.75]}


def test_a_direction_that_is_ours_in_every_seed_agrees(tmp_path):
    shown = section(page_of(tmp_path, SMALL), PUBLISHED.tables["small_model"].title)
    assert cells(shown, "RL alone") == ["47%", "50.0% ± 10.0", "1 min 0 s ± 0.0 s"]
    assert cells(shown, "distilled") == ["72.6%", "65.0% ± 13.2", "1 min 0 s ± 0.0 s"]
    # Gaps 0.1, 0.2, 0.15: seed by seed, whose deviation is less than the rows'.
    assert verdict(shown) == ("3 of 3", "+15.0 ± 5.0", "agrees")
    assert PUBLISHED.tables["small_model"].compare[0].otherwise not in shown
    assert "](paper/small_model.svg)" in shown


def test_one_that_is_not_is_said_with_what_is_different_here(tmp_path):
    opposite = {"small_rl.accuracy": [0.6, 0.7, 0.8], "small_distilled.accuracy": [0.5, 0.6, 0.8]}
    shown = section(page_of(tmp_path, opposite), PUBLISHED.tables["small_model"].title)
    assert verdict(shown) == ("0 of 3", "-6.7 ± 5.8", "does not agree")
    assert PUBLISHED.tables["small_model"].compare[0].otherwise in shown


def test_seeds_that_differ_decide_nothing(tmp_path):
    mixed = SMALL | {"small_rl.accuracy": [0.6, 0.5, 0.6]}
    shown = section(page_of(tmp_path, mixed), PUBLISHED.tables["small_model"].title)
    assert verdict(shown) == ("2 of 3", "+8.3 ± 16.1", "not decided")


def test_what_has_not_been_run_is_said_to_be_missing(tmp_path):
    page = page_of(tmp_path, SMALL | {"small_distilled.accuracy": [0.5, None, None]})
    shown = section(page, PUBLISHED.tables["small_model"].title)
    assert cells(shown, "distilled")[1].startswith("50.0% (1 of 3")
    assert verdict(shown)[:2] == ("1 of 1", "+10.0")
    other = section(page, PUBLISHED.tables["votes"].title)
    assert cells(other, "N = 1") == ["79.8%", "–"] and verdict(other) is None
    assert "votes.svg" not in page


def test_figures_of_a_stage_at_work_are_not_its_results(tmp_path):
    page = page_of(tmp_path, SMALL, {"small_distilled": "unfinished"})
    assert "3 of 6" in page
    shown = section(page, PUBLISHED.tables["small_model"].title)
    assert cells(shown, "distilled") == ["72.6%", "–", "–"] and verdict(shown) is None


def test_a_table_of_several_comparisons_counts_them(tmp_path):
    values = {
        "base.accuracy": [0.2] * 3,
        "format_only.accuracy": [0.25] * 3,
        "accuracy_only.accuracy": [0.8] * 3,
        "r1_zero.accuracy": [0.7] * 3,
    }
    shown = section(page_of(tmp_path, values), PUBLISHED.tables["rewards"].title)
    summary = re.search(r"\*\*(.*?)\*\*", shown)[1]
    assert "agrees" in summary and "2 of 3" in summary


def test_plots_are_whole_documents_in_colors_of_the_report(tmp_path):
    hacked = {f"judged.reward@{step}": [step / 50 + 0.01] * 3 for step in (0, 12, 48)}
    hacked |= {f"judged.win_rate@{step}": [0.5, 0.6, 0.55] for step in (0, 12, 48)}
    files = write_page(tmp_path / "paper.md", PUBLISHED, Results(a_report(SMALL | hacked)))
    assert {file.name for file in files} == {"paper.md", "small_model.svg", "preference.svg"}
    for file in files[1:]:
        assert file.parent == tmp_path / "paper"
        svg = file.read_text()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "#2b66d9" in svg and "var(" not in svg and "#05" not in svg


def test_every_table_has_its_stages_and_figures_that_its_stages_leave():
    recipe = load_pipeline(RECIPE)
    assert set(PUBLISHED.tables) == {
        "algorithms", "rewards", "sft_data", "small_model", "language", "preference", "votes",
    }  # fmt: skip
    for name, table in PUBLISHED.tables.items():
        assert table.stages <= set(recipe.stages), name
        for reference in table.references:
            stage, figure = tables.split(reference)
            config = recipe.stages[stage]
            evaluated = [s for s in recipe.stages.values() if s.evaluates == stage]
            if figure == "accuracy":
                assert config.verb == "rl" or evaluated, reference
    steps = recipe.stages["preferred"].settings
    assert [
        ref.partition("@")[2] for ref in PUBLISHED.tables["preference"].references if "@" in ref
    ]
    for reference in PUBLISHED.tables["preference"].references:
        step = int(reference.partition("@")[2])
        assert step <= steps["run"]["steps"] and step % steps["eval"]["every"] == 0
    sizes = recipe.stages["votes"].arguments["sizes"]
    assert {f"votes.majority@{size}" for size in sizes} == PUBLISHED.tables["votes"].references
    names = {tables.split(r)[1] for r in PUBLISHED.tables["algorithms"].references} - {"accuracy"}
    assert {f"learning.{name}" for name in recipe.stages["learning"].arguments} == {
        f"learning.{name}" for name in names
    }


def test_every_stages_settings_are_valid(capsys):
    assert cli.main(["pipeline", str(RECIPE), "--pipeline.status", "true"]) == 0
    assert "small_distilled" in capsys.readouterr().out
    plan = PipelinePlan.from_recipe(load_pipeline(RECIPE), RECIPE, Path("runs/paper"), 0)
    configs = {n: plan.config(s) for n, s in plan.stages.items() if s.config.verb != MAKE}
    # Rows that are compared differ in what they are about, and in nothing else.
    zero = configs["r1_zero"].model_dump()
    for name, sections in {
        "ppo_095": {"rl", "critic"},
        "ppo_100": {"rl", "critic"},
        "reinforce": {"rl"},
        "rlhf": {"rewards"},
        "format_only": {"rewards"},
        "accuracy_only": {"rewards"},
        "one_language": {"rewards"},
        "few_rl": {"model"},
        "small_rl": {"model"},
    }.items():
        other = configs[name].model_dump()
        different = {key for key in zero if zero[key] != other[key]} - {"run"}
        assert different == sections, name
        assert configs[name].run.steps == configs["r1_zero"].run.steps
        same = ("prompts_per_rollout", "group_size", "minibatches")
        assert all(getattr(configs[name].rl, key) == zero["rl"][key] for key in same), name
    assert configs["ppo_095"].rl.gae_lambda == 0.95 and configs["ppo_100"].rl.gae_lambda == 1.0
    # `rl` evaluates as `sample` draws.
    drawn = configs["few_answers"]
    assert (drawn.rollout.temperature, drawn.rollout.top_p, drawn.sample.samples) == (
        zero["eval"]["temperature"],
        zero["eval"]["top_p"],
        zero["eval"]["samples"],
    )


def test_one_table_needs_its_stages_and_those_that_evaluate_them():
    stages = needed_stages(PUBLISHED.tables["small_model"])
    assert stages == ["small_rl", "small_distilled", "small_figures"]
    graph = StageGraph(
        PipelinePlan.from_recipe(load_pipeline(RECIPE), RECIPE, Path("runs/paper"), 0).stages
    )
    above = set().union(*(graph.needs(stage) for stage in stages))
    assert {"base", "few", "small_answers"} <= above
    assert not {"ppo_095", "rlhf", "preferred", "many"} & above


def test_without_a_report_there_is_no_page(tmp_path, capsys):
    options = ["--folder", str(tmp_path), "--page", str(tmp_path / "p.md"), "--page-only"]
    assert main(options) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps(a_report(SMALL)))
    assert main(options) == 0 and "65.0%" in (tmp_path / "p.md").read_text()


def test_a_comparison_of_rows_that_are_not_there_is_refused(tmp_path):
    text = tables.PUBLISHED.read_text().replace("below: reinforce", "below: reinforced")
    (tmp_path / "published.yaml").write_text(text)
    with pytest.raises(ValueError, match="reinforced"):
        tables.load_tables(tmp_path / "published.yaml")


def answers(question: str, texts: list[str], kind: str = "math", truth: str = "7") -> list[dict]:
    return [
        {
            "id": question,
            "index": index,
            "kind": kind,
            "question": question,
            "response": f"<think>…</think><answer>{text}</answer>",
            "rewards": {"accuracy": float(text == truth)},
        }
        for index, text in enumerate(texts)
    ]


def lines(path: Path, rows_: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    return str(path)


def figures(folder: Path) -> dict:
    return {k: v["value"] for k, v in json.loads((folder / "figures.json").read_text()).items()}


def test_majority_votes(tmp_path):
    # 7 is right. Programs (c) cannot be compared, and do not vote.
    samples = answers("a", ["8", "7", "7"]) + answers("b", ["7", "8", "8"])
    samples += answers("c", ["x", "y", "7"], kind="code")
    measure.votes(tmp_path, lines(tmp_path / "samples.jsonl", samples[::-1]), [1, 2, 3])
    found = figures(tmp_path)
    assert found["majority@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    # Of two that differ the first counts: a has 8|7, 8|7, 7|7; b has 7|8, 7|8, 8|8.
    assert found["majority@2"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found["majority@3"] == pytest.approx((1 + 0) / 2)


def test_a_judge_compares_with_the_first_step_and_the_reward_is_the_reward_models(tmp_path):
    question = "Mary asks: what do cats eat?"
    good, bad = "Cats eat fish, Mary. Have a nice day!", "Bees make honey."

    def row(step: int, text: str, reward: float, split: str = "eval") -> dict:
        response = f"<think></think><answer>{text}</answer>"
        facts = {"step": step, "split": split, "id": "q", "question": question}
        return facts | {"response": response, "rewards": {"accuracy": reward}}

    samples = [
        row(0, bad, 0.2), row(0, bad, 0.4), row(3, good, 0.9, "train"),
        row(6, good, 0.7), row(6, bad, 0.9),
    ]  # fmt: skip
    measure.judged(tmp_path, lines(tmp_path / "samples.jsonl", samples))
    assert figures(tmp_path) == pytest.approx(
        {"reward@0": 0.3, "win_rate@0": 0.5, "reward@6": 0.8, "win_rate@6": 0.75}
    )


def test_accuracy_while_learning_is_the_mean_of_all_steps(tmp_path):
    path = lines(tmp_path / "metrics.jsonl", [{"accuracy": 0.2}, {"accuracy": 0.4}])
    measure.learning(tmp_path, grpo=path)
    assert figures(tmp_path) == pytest.approx({"grpo": 0.3})


def test_pairs_are_a_right_and_a_wrong_answer_to_one_question(tmp_path):
    samples = answers("a", ["7", "8", "9", "7"]) + answers("b", ["7", "7"])
    samples[3]["rewards"] = {}  # not graded
    samples += answers("c", ["7", "8"])
    samples[-1]["response"] = " "  # empty
    rows.right_and_wrong(tmp_path, lines(tmp_path / "samples.jsonl", samples))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert [(p["question"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("a", samples[0]["response"], samples[1]["response"])
    ]


def test_few_examples_are_the_first_of_the_many(tmp_path):
    path = lines(tmp_path / "all.jsonl", [{"n": n} for n in range(5)])
    rows.first(tmp_path, path, 2)
    assert (tmp_path / "sft.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n'
    with refused("examples", Cause.TOO_LARGE, 6, 5):
        rows.first(tmp_path, path, 6)


def test_the_world_and_its_base_models_are_those_of_the_laptop_pipeline():
    paper = load_pipeline(RECIPE).stages
    laptop = load_pipeline(ROOT / "examples/laptop/r1.yaml").stages
    pairs = {name: name for name in ("corpus", "questions", "model", "base")}
    text = {"small_model": "qwen_model", "small_base": "qwen_base"}
    for ours, theirs in (pairs | text).items():
        for part in ("function", "arguments"):
            assert getattr(paper[ours], part) == getattr(laptop[theirs], part), ours
        settings = [
            dict(stages[name].settings) for stages, name in ((paper, ours), (laptop, theirs))
        ]
        for each in settings:
            each.pop("model", None)
        assert settings[0] == settings[1], ours
