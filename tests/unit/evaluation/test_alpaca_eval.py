"""AlpacaEval 2 from its public layout: a served model, a judge that compares, win rates in all
that an evaluation writes; stopped and continued."""

import json
import re

import pytest
from fakes.openai_server import FakeServer
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.commands.cli import main
from megatron_r1.config import parse_recipe
from megatron_r1.evaluation.prompt_sets import load_prompt_sets

REFERENCE = "Paris it is."
ROWS = [
    {
        **{"dataset": "helpful_base", "instruction": f"Which city is number {i}?"},
        **{"output": REFERENCE, "generator": "gpt4_1106_preview", "datasplit": "eval"},
    }
    for i in range(6)
]
SHOWN = re.compile(r"\[response (A|B) ([0-9a-f]{16})\]\n(.*?)\n\[end of response", re.DOTALL)
SAID = {  # responses of the model; the judge sees what follows the thought
    0: "<think>A thought that is longer than anything else here.</think>Paris!",
    1: "Paris, as everybody knows who has ever been there.",
    2: "Paris it is.",
    3: "Rome, I believe, or was it Athens? It is hard to say.",
    4: "Paris, or so they say, and I have no reason to doubt it.",
    5: "<think>never closed",
}


def length_lover(question):
    """Prefer the longer response, unless it is the check of the judge itself (12 is right)."""
    key, (first, second) = None, (None, None)
    (_, key, first), (_, _, second) = SHOWN.findall(question)
    score = [("12" in text, len(text)) for text in (first, second)]
    verdict = "tie" if score[0] == score[1] else "A" if score[0] > score[1] else "B"
    return 200, json.dumps({"key": key, "verdict": verdict})


@pytest.fixture
def evaluate(tmp_path):
    """A function that evaluates with a served model and judge. command: `main` returns the exit
    status, `_dispatch_command` raises."""
    (tmp_path / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(ROWS))
    entry = {"name": "alpaca_eval_2", "path": str(tmp_path), "samples": 1}

    def run(server, *options, mode="compare", command=main):
        judge = {"url": server.url, "model": "j", "mode": mode, "retry_seconds": 1}
        judge |= {"votes": 2} if mode == "compare" else {}
        recipe = tmp_path / "eval.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "run": {"folder": str(tmp_path / "out")},
                    "rewards": {"workers": 1, "timeout_seconds": 600, "options": {"judge": judge}},
                    "eval": {
                        "benchmarks": [entry],
                        "server": {"url": server.url, "model": "m", "retry_seconds": 1},
                    },
                }
            )
        )
        return command(["eval", str(recipe), *options])

    return run


def answer(question, body):
    if body["model"] == "j":
        return length_lover(question) if "response A" in question else (200, "ready")
    number = re.search(r"number (\d)", question)
    return 200, SAID[int(number[1])] if number else "?"


def test_win_rates_are_in_all_that_an_evaluation_writes(evaluate, tmp_path, capsys):
    with FakeServer(answer) as server:
        assert evaluate(server) == 0
    [result] = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"].values()
    metrics = result["metrics"]
    # Longer, longer, longer: 3 wins; one tie; shorter and none at all: 2 losses.
    assert metrics["win_rate"]["value"] == pytest.approx(3.5 / 6)
    assert 0.3 < metrics["lc_win_rate"]["value"] < 0.7
    assert "pass@1" not in metrics and metrics["lc_win_rate"]["low"] is not None
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").open()]
    by_text = {s["response"]: s["reward"] for s in samples}
    assert [by_text[text] for text in SAID.values()] == [0.0, 1.0, 0.5, 1.0, 1.0, 0.0]
    # Either order, once each; the thought is not shown.
    judged = [b["messages"][0]["content"] for b in server.requests if b["model"] == "j"]
    orders = [[text for *_, text in SHOWN.findall(prompt)] for prompt in judged]
    assert not any("thought" in text for order in orders for text in order)
    assert [SAID[1], REFERENCE] in orders and [REFERENCE, SAID[1]] in orders
    assert ["Paris!", REFERENCE] in orders
    shown = capsys.readouterr().out
    assert "wins: 58.3%" in shown and "at equal length: " in shown
    assert "lc_win_rate" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/eval.png").read_bytes()[:4] == b"\x89PNG"


def test_it_continues_and_asks_the_model_nothing_twice(evaluate, tmp_path, capsys):
    def judge_fails(question, body):
        is_asked = body["model"] == "j" and "number 4" in question
        return (503, "down") if is_asked else answer(question, body)

    with FakeServer(judge_fails) as server:
        assert evaluate(server) == 1
    before = len((tmp_path / "out/samples.jsonl").read_text().splitlines())
    assert before < 6
    with FakeServer(answer) as server:  # model and judge at another address
        assert evaluate(server) == 0
        assert sum(body["model"] == "m" for body in server.requests) == 6 - before
    with refused("rewards.options", Cause.CHANGED):
        evaluate(server, "--rewards.options.judge.votes", "4", command=cli._dispatch_command)
    [result] = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"].values()
    assert result["metrics"]["win_rate"]["value"] == pytest.approx(3.5 / 6)


def test_a_judge_that_would_only_verify_is_refused_at_once(evaluate):
    with FakeServer(answer) as server:
        with refused("rewards.options.judge.mode", Cause.CONFLICT, "compare", "verify"):
            evaluate(server, mode="verify", command=cli._dispatch_command)
        assert not server.requests


def test_the_instruction_is_asked_as_it_is_and_the_reference_is_the_truth(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    entry = {"name": "alpaca_eval_2", "path": str(tmp_path / "a.json"), "limit": 2}
    [found] = load_prompt_sets(parse_recipe({"eval": {"benchmarks": [entry]}}))
    assert found.is_pairwise and [p.question for p in found.prompts] == [
        row["instruction"] for row in ROWS[:2]
    ]
    assert {(p.kind, p.truth) for p in found.prompts} == {("judge", REFERENCE)}
