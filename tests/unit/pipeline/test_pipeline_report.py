"""The numbers of a pipeline's report against the files they are from, and its drawing."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from pipeline_world import World, recipe
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.pipeline import rl_plots
from megatron_r1.pipeline.graph_svg import BOX_HEIGHT, BOX_WIDTH, Box, graph_svg
from megatron_r1.pipeline.results import Spread, StageResult, read_results, result_headline

RECIPE = recipe("reported")
TRAIN = """
import json

def train(folder, gain):
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 21):
            line = {"step": step, "accuracy": step / 40, "reward/mean": step / 30,
                    "response_length/mean": 10 * step, "language/mean": 0.9 + step / 400}
            file.write(json.dumps(line) + "\\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for step in (0, 20):
            line = {"step": step, "eval/pass@1": 0.2 + 0.1 * gain + step / 400, "eval/cons@8": 0.9,
                    "interval/pass@1/low": 0.1, "interval/pass@1/high": 0.95,
                    "eval/response_length": 100 + gain}
            file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rl.py").write_text(TRAIN)
    return World(tmp_path, RECIPE)


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_the_report_has_the_command_with_its_settings(world):
    assert world.run("--pipeline.until=zero", "--stages.zero.arguments.gain", "2") == 0
    command = "megatron-r1 pipeline p.yaml --pipeline.until=zero --stages.zero.arguments.gain=2"
    assert json.loads((world.out / "report.json").read_text())["command"] == command
    assert f"`{command}`" in (world.out / "report.md").read_text()
    assert f"command {command}" in text_of((world.out / "report.html").read_text())


@pytest.mark.more
def test_the_page_shows_the_numbers_of_the_files(world):
    assert world.run() == 0
    result = json.loads((world.out / "report.json").read_text())
    r1 = result["stages"]["r1"]["by_seed"]["0"]
    assert r1["state"] == "done" and r1["seconds"] > 0
    numbers = {name: figure["value"] for name, figure in r1["figures"].items()}
    assert numbers == pytest.approx(
        # Length is the held-out one, purity the mean of the last two of twenty steps.
        {"accuracy": 0.55, "majority": 0.9, "length": 103.0, "win_rate": 0.61, "votes": 40.0}
        | {"language": 0.9 + 19.5 / 400}
    )
    assert r1["figures"]["accuracy"] == {
        "value": pytest.approx(0.55), "low": 0.1, "high": 0.95,
        "source": "evaluations.jsonl: eval/pass@1, last step",
    }  # fmt: skip
    assert result["stages"]["wins"]["evaluates"] == "r1"
    page = (world.out / "report.html").read_text()
    shown = text_of(page)
    assert "R1-Zero 25.0% (10.0–95.0) 90.0% 100 94.9% – –" in shown
    assert "r1 55.0% (10.0–95.0) 90.0% 103 94.9% 61.0% (50.0–72.0) 40.0" in shown
    assert "R1 &lt;small&gt;" in page and "<small>" not in page
    lines = (world.out / "report.md").read_text().splitlines()
    assert "| r1 | 55.0% (10.0–95.0) | 90.0% | 103 | 94.9% | 61.0% (50.0–72.0) | 40.0 |" in lines
    assert len({line.count("|") for line in lines[4:]}) == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


TWICE = recipe("twice")


@pytest.mark.more
def test_an_evaluation_does_not_replace_what_was_measured_before(world):
    world.write(TWICE)
    assert world.run() == 0
    stages = json.loads((world.out / "report.json").read_text())["stages"]
    shown_in = {name: stage["evaluates"] for name, stage in stages.items()}
    assert shown_in == {"rl": "", "trained": "", "alone": "", "with": "rl", "again": ""}
    values = {name: figure["mean"] for name, figure in stages["rl"]["figures"].items()}
    assert values["accuracy"] == pytest.approx(0.55) and values["wins"] == 0.6
    assert values["language"] == 0.2  # until then a mean over training's own samples
    lines = (world.out / "report.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines if line.startswith("| ")][1:] == [
        "| rl", "| trained", "| Without the tool", "| again",
    ]  # fmt: skip
    assert "| Without the tool | 0.0% |" in "\n".join(lines)


@pytest.mark.more
def test_several_seeds_are_a_mean_and_its_deviation(world):
    assert world.run("--pipeline.seeds", "0,1,3") == 0
    figure = json.loads((world.out / "report.json").read_text())["stages"]["zero"]["figures"]
    values = [0.25, 0.35, 0.55]
    assert figure["accuracy"]["values"] == pytest.approx(values)
    assert figure["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert figure["accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    shown = text_of((world.out / "report.html").read_text())
    assert "R1-Zero 38.3% ± 15.3" in shown


def test_held_out_points_span_the_seeds_or_their_own_interval():
    runs = [
        [{"step": 0, "eval/pass@1": value, "interval/pass@1/low": 0.1, "interval/pass@1/high": 0.9}]
        for value in (0.2, 0.3, 0.7)
    ]
    [several] = rl_plots.heldout_points(runs, "eval/pass@1", "accent")
    assert (several.low[0], several.values[0], several.high[0]) == (0.2, pytest.approx(0.4), 0.7)
    [one] = rl_plots.heldout_points(runs[:1], "eval/pass@1", "accent")
    assert (one.low[0], one.values[0], one.high[0]) == (0.1, 0.2, 0.9)


def test_a_report_of_a_pipeline_that_failed_says_so(world):
    world.write(RECIPE.replace("{gain: 3}", "{gain: many}"))
    assert world.run() == 1
    stages = json.loads((world.out / "report.json").read_text())["stages"]
    assert [stages[name]["by_seed"]["0"]["state"] for name in stages] == [
        "done", "failed", "pending",
    ]  # fmt: skip
    assert "TypeError" in str(stages["r1"]["by_seed"]["0"]["reasons"])
    assert stages["wins"]["figures"] == {}


def test_figures_of_an_evaluation(tmp_path):
    def benchmark(value):
        names = ("pass@1", "pass@4", "cons@4", "length", "truncated")
        estimates = {n: {"value": value, "low": value - 0.1, "high": None} for n in names}
        return {"samples_per_question": 4, "metrics": estimates, "counts": {}}

    (tmp_path / "eval.json").write_text(json.dumps({"benchmarks": {"sums": benchmark(0.5)}}))
    one = read_results(tmp_path)
    assert {n: f.value for n, f in one.items()} == {"accuracy": 0.5, "majority": 0.5, "length": 0.5}
    two = {"benchmarks": {"sums": benchmark(0.5), "AIME 2024": benchmark(0.2)}}
    (tmp_path / "eval.json").write_text(json.dumps(two))
    assert {n: f.value for n, f in read_results(tmp_path).items()} == {
        "sums": 0.5,
        "AIME 2024": 0.2,
    }


def test_figures_of_supervised_training_are_its_loss(tmp_path):
    lines = [json.dumps({"step": i, "loss": 100 - i}) for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_results(tmp_path)
    assert found["loss"].value == np.mean([64, 63, 62, 61])
    assert result_headline(found) == "loss 62.5"


@pytest.mark.more
def test_figures_that_a_stage_gives_itself(world, tmp_path, capsys):
    (tmp_path / "figures.json").write_text('{"win_rate": 0.5, "pairs": {"value": 1200}}')
    assert read_results(tmp_path) == {"win_rate": StageResult(0.5), "pairs": StageResult(1200)}
    assert (
        StageResult(1200).format("pairs") == "1,200"
        and StageResult(0.5).format("win_rate") == "50.0%"
    )
    world.write(RECIPE.replace("votes: 40", "votes: {lower: 1}"))
    assert world.run() == 1
    assert "figures.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "figures",
    [
        '{"win_rate": NaN}', '{"win_rate": {"value": -Infinity}}', '{"win_rate": {"value": null}}',
        '{"win_rate": {"value": 0.5, "low": NaN, "high": 0.6}}', '{"win_rate": {"value": "0.5"}}',
        '{"win_rate": null}', f'{{"win_rate": 1{"0" * 400}}}',
    ],
)  # fmt: skip
def test_figures_that_are_no_finite_numbers_are_refused(tmp_path, figures):
    (tmp_path / "figures.json").write_text(figures)
    with refused("figures.json", Cause.MALFORMED, tmp_path):
        read_results(tmp_path)


def test_a_stage_fails_whose_figures_are_no_numbers_and_the_report_is_written(world, capsys):
    world.write(
        "pipeline: {folder: out}\nstages:\n"
        "  wins: {verb: make, function: 'tiny:figures', arguments: {win_rate: .nan}}\n"
    )
    assert world.run() == 1
    assert "win_rate is nan" in capsys.readouterr().err
    assert (world.out / "report.html").exists()


def test_a_spread_of_one_has_no_deviation():
    assert Spread.from_values([0.5]) == Spread(0.5, None, [0.5])
    assert Spread.from_values([0.5]).format("accuracy") == "50.0%"
    assert Spread.from_values([90.0, 110.0]).format("length") == "100 ± 14.1"


UPSTREAM = {
    "base": (), "zero": ("base",), "data": ("zero",), "sft": ("base", "data"),
    "rm": ("base",), "r1": ("sft", "rm"), "student": ("sft",), "eval": ("r1", "zero"),
}  # fmt: skip
DEPTHS = {"base": 0, "zero": 1, "data": 2, "sft": 3, "rm": 1, "r1": 4, "student": 4, "eval": 5}


def test_the_drawing_has_a_box_per_stage_and_no_edge_through_a_box():
    boxes = {name: Box("done", name, "rl · done") for name in UPSTREAM}
    svg = ElementTree.fromstring(graph_svg(boxes, UPSTREAM, DEPTHS))
    rects = [(float(r.get("x")), float(r.get("y"))) for r in svg.iter("rect")]
    assert len(rects) == len(UPSTREAM)
    for i, (x, y) in enumerate(rects):
        for other_x, other_y in rects[i + 1 :]:
            assert abs(x - other_x) >= BOX_WIDTH or abs(y - other_y) >= BOX_HEIGHT
    edges = [p.get("d") for p in svg.iter("path") if "C" in p.get("d")]
    assert len(edges) == sum(map(len, UPSTREAM.values()))
    for edge in edges:
        for px, py in _points(edge):
            inside = [
                (x, y) for x, y in rects
                if x + 1 < px < x + BOX_WIDTH - 1 and y + 1 < py < y + BOX_HEIGHT - 1
            ]  # fmt: skip
            assert not inside, (edge, px, py)


def _points(path):
    """Points along a path of lines and cubic curves."""
    here = None
    for kind, numbers in re.findall(r"([MLC])([^MLC]*)", path):
        values = [float(v) for v in re.findall(r"-?\d+\.?\d*", numbers)]
        points = np.array(values).reshape(-1, 2)
        if kind == "C":
            a, b, c, d = np.array(here), *points
            for t in np.linspace(0, 1, 41):
                yield (
                    a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t * t * (1 - t) + d * t**3
                )
        elif kind == "L":
            yield from np.linspace(here, points[0], 20)
        here = points[-1]
