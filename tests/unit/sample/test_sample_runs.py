"""`megatron-r1 sample` against a served model: requests, kept responses, resuming, refusals."""

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from fakes.openai_server import FakeServer
from refusals import refused
from waiting import wait_until

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.json_lines import append_lines
from megatron_r1.commands import cli
from megatron_r1.commands.cli import main
from megatron_r1.commands.sample import from_run
from megatron_r1.data.prompt import make_prompt, normalize_question
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.sample.result_cache import ResultCache
from megatron_r1.sample.second_pass import WINDOW, PromptResult, decide_all
from megatron_r1.sample.selection import Decision

REFUSED = yaml.safe_load(Path(__file__).with_name("refused_runs.yaml").read_text())
# A reward that loads in no time, where `math` brings sympy into every worker.
QUESTIONS = [
    {"question": f"What is {i} + {i}?", "truth": str(2 * i), "kind": "my_data:exact"}
    for i in range(6)
]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked_number(question):
    found = re.findall(r"What is (\d+)", question)
    return int(found[-1]) if found else 0


def sums(question, body):
    """Right where the seed is even: about half of the answers, always the same ones."""
    number, seed = asked_number(question), body["seed"]
    thought = f"I add {number} and {number}, by way of {seed}."
    return 200, f"<think>{thought}</think> <answer>{2 * number + seed % 2}</answer>"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe for a server and returns its path; `my_data.py` is where it starts."""
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "my_data.py").write_text(
        "from r1_grading import Grade\n"
        "def exact(response, truth, **entry):\n"
        "    found = response.partition('<answer>')[2].partition('<')[0]\n"
        "    return Grade(float(found == truth), f'{found}, expected {truth}')\n"
        "def longer(question, first, second):\n"
        "    return 0.5 + 0.5 * (len(first) > len(second)) - 0.5 * (len(first) < len(second))\n"
        "def is_safe(question, response): return '1' not in response\n"
        "def readable(question, response):\n"
        f"    with open({str(tmp_path / 'rewritten')!r}, 'a') as log: log.write('x')\n"
        "    if 'What is 1 ' in question: return None\n"
        "    if 'What is 2 ' in question: return '<think>Spoilt.</think><answer>99</answer>'\n"
        "    return '<think>Tidy.</think>' + response.partition('</think>')[2]\n"
    )
    monkeypatch.chdir(tmp_path)
    # `find_function` extends the path; the next test has a `my_data.py` of its own.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_data", raising=False)

    def write(url, **sample):
        tree = {
            "run": {"folder": str(tmp_path / "out")},
            "data": {"path": str(tmp_path / "q.jsonl"), "heldout_fraction": 0},
            "rollout": {"max_response_tokens": 64},
            "rewards": {"workers": 1, "timeout_seconds": 600},
            "sample": {
                "samples": 4,
                "server": {"url": url, "model": "m", "concurrency": 2},
                **sample,
            },
        }
        path = tmp_path / "sample.yaml"
        path.write_text(json.dumps(tree))
        return str(path)

    return write


def test_right_answers_are_kept_and_every_answer_says_why(recipe, tmp_path, capsys):
    render = {"template": "Q: {question}", "response": "<think>{thought}</think>{summary}"}
    with FakeServer(sums) as server:
        assert main(["sample", recipe(server.url, render=render)]) == 0
        assert len(server.requests) == 24 == len({r["seed"] for r in server.requests})
    samples = lines(tmp_path / "out/samples.jsonl")
    assert [(s["question"], s["index"]) for s in samples] == [
        (q["question"], i) for q in QUESTIONS for i in range(4)
    ]
    for s in samples:
        is_correct = s["seed"] % 2 == 0
        assert (s["rewards"]["accuracy"], s["decision"]) == (
            (1.0, "kept") if is_correct else (0.0, "wrong")
        )
        assert s["why"].endswith("" if is_correct else "; format as asked")
    rows = lines(tmp_path / "out/sft.jsonl")
    kept = [s for s in samples if s["decision"] == "kept"]
    assert 5 < len(kept) < 19
    for row, s in zip(
        sorted(rows, key=str), sorted(kept, key=lambda s: s["question"]), strict=True
    ):
        assert row["prompt"].startswith("Q: What is") and s["question"] in row["prompt"]
        assert re.fullmatch(r"<think>I add .*\.</think>\d+", row["response"])
    result = json.loads((tmp_path / "out/sample.json").read_text())
    assert result["decisions"] == {"kept": len(kept), "wrong": 24 - len(kept)}
    assert result["accuracy"] == pytest.approx(len(kept) / 24)
    printed = capsys.readouterr().out.split()
    assert {"24", "6", str(len(kept)), "wrong"} <= set(printed)


@pytest.mark.more
def test_another_choice_is_made_without_sampling_again(recipe, tmp_path):
    with FakeServer(sums) as server:
        assert main(["sample", recipe(server.url)]) == 0
        first = (tmp_path / "out/sft.jsonl").read_bytes()
        answers = {
            (s["id"], s["index"]): s["response"] for s in lines(tmp_path / "out/samples.jsonl")
        }
        path = recipe(server.url, keep={"per_prompt": 1, "choose": "shortest"})
        assert main(["sample", path]) == 0
        assert len(lines(tmp_path / "out/sft.jsonl")) <= 6
        assert main(["sample", recipe(server.url)]) == 0
        assert len(server.requests) == 24
        assert (tmp_path / "out/sft.jsonl").read_bytes() == first
        # More answers are added to those that are there; with fewer, none is thrown away.
        assert main(["sample", recipe(server.url, samples=5)]) == 0
        assert len(server.requests) == 30
        assert main(["sample", recipe(server.url, samples=2)]) == 0
        samples = lines(tmp_path / "out/samples.jsonl")
        assert len(samples) == 30 and len(server.requests) == 30
        assert sum(s["decision"] == "not_asked" for s in samples) == 18
        found = {(s["id"], s["index"]): s["response"] for s in samples}
        assert answers.items() <= found.items()
        assert main(["sample", recipe(server.url)]) == 0
        assert (tmp_path / "out/sft.jsonl").read_bytes() == first


def test_a_stopped_command_continues_and_asks_nothing_twice(recipe, tmp_path, capsys):
    answered = []

    def fails_after_nine(question, body):
        if body["max_tokens"] != 1:
            answered.append(body["seed"])
        if len(answered) <= 9:
            return sums(question, body)
        wait_until((tmp_path / "out/samples.jsonl").exists)  # something is there when it fails
        return 401, "key expired"

    with FakeServer(fails_after_nine) as server:
        assert main(["sample", recipe(server.url)]) == 1
    assert "key expired" in capsys.readouterr().err
    kept = lines(tmp_path / "out/samples.jsonl")
    assert 1 <= len(kept) <= 9 and not (tmp_path / "out/sft.jsonl").exists()
    # A kill in the middle of a write leaves half a line.
    with (tmp_path / "out/samples.jsonl").open("a") as file:
        file.write('{"id": "0172')
    with FakeServer(sums) as server:
        assert main(["sample", recipe(server.url)]) == 0
        assert len(server.requests) == 24 - len(kept)
        assert not {r["seed"] for r in server.requests} & {s["seed"] for s in kept}
    continued = [(tmp_path / "out" / name).read_bytes() for name in ("samples.jsonl", "sft.jsonl")]
    with FakeServer(sums) as server:
        path = recipe(server.url)
        assert main(["sample", path, "--run.folder", str(tmp_path / "whole")]) == 0
    whole = [(tmp_path / "whole" / name).read_bytes() for name in ("samples.jsonl", "sft.jsonl")]
    assert continued == whole


@pytest.mark.more
def test_what_changes_answers_or_grades_is_refused_by_name(recipe, tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"question": "a", "response": "b"}\n')
    changes = {
        "rollout.temperature": "0.7",
        "run.seed": "1",
        "rewards.weights": "{accuracy: 1.0}",
        "sample.server.model": "other",
        "sample.shots": "shots.jsonl",
    }
    with FakeServer(sums) as server:
        path = recipe(server.url, samples=1)
        assert main(["sample", path]) == 0
        for key, value in changes.items():
            with refused(key, Cause.CHANGED):
                cli._dispatch_command(["sample", path, f"--{key}", value])
        data = tmp_path / "q.jsonl"
        data.write_text(data.read_text().replace('"truth": "4"', '"truth": "5"'))
        with refused("run.folder", Cause.CHANGED, "What is 2 + 2?"):
            cli._dispatch_command(["sample", path])
        assert len(server.requests) == 6


@pytest.mark.more
def test_shots_go_before_the_question_and_not_into_the_data(recipe, tmp_path):
    (tmp_path / "shots.jsonl").write_text(
        '{"question": "Shown?", "response": "<think>S</think>s"}\n'
    )
    with FakeServer(sums) as server:
        assert main(["sample", recipe(server.url, shots="shots.jsonl", samples=2)]) == 0
        turns = server.requests[0]["messages"]
    assert [t["role"] for t in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == "Shown?" and "What is" in turns[2]["content"]
    for name in ("sft.jsonl", "samples.jsonl"):
        assert "Shown" not in (tmp_path / "out" / name).read_text()
    with FakeServer(sums) as server:
        url = {"url": server.url, "model": "m", "api": "completions"}
        path = recipe("", shots="shots.jsonl", samples=1, server=url)
        arguments = ["--run.folder", str(tmp_path / "text"), "--data.template", "Q {question} A"]
        assert main(["sample", path, *arguments]) == 0
        prompts = [r["prompt"] for r in server.requests]
    assert all(p.startswith("Q Shown? A<think>S</think>s\n\nQ What is") for p in prompts)


@pytest.mark.more
def test_kept_answers_are_rewritten_graded_again_and_remembered(recipe, tmp_path):
    with FakeServer(sums) as server:
        path = recipe(server.url, rewrite="my_data:readable", keep={"per_prompt": 2})
        assert main(["sample", path]) == 0
        samples = lines(tmp_path / "out/samples.jsonl")
        num_calls = len((tmp_path / "rewritten").read_text())
        decided = {}
        for s in samples:
            decided.setdefault(asked_number(s["question"]), set()).add(s["decision"])
        right = {asked_number(s["question"]) for s in samples if s["rewards"]["accuracy"]}
        assert {1, 2} <= right
        # None: the next one is tried, until there is none; an answer that was spoilt is wrong.
        assert decided[1] <= {"wrong", "not_rewritten"}
        assert decided[2] <= {"wrong", "rewritten_wrong"}
        rows = lines(tmp_path / "out/sft.jsonl")
        assert rows and all(row["response"].startswith("<think>Tidy.</think>") for row in rows)
        assert not {asked_number(row["prompt"]) for row in rows} & {1, 2}
        before = (tmp_path / "out/sft.jsonl").read_bytes()
        assert main(["sample", path]) == 0
        assert len((tmp_path / "rewritten").read_text()) == num_calls
        assert (tmp_path / "out/sft.jsonl").read_bytes() == before


def free_text(question, body):
    return 200, "<think>Hm.</think>" + "word " * (1 + body["seed"] % 9)


@pytest.mark.more
def test_pairs_and_labels_need_no_truth(recipe, tmp_path):
    rows = [{"question": f"Tell me about {i}."} for i in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with FakeServer(free_text) as server:
        any_length = {"max_length_bias": None}
        judge = {"output": "pairs", "judge": "my_data:longer", "pairs": any_length}
        assert main(["sample", recipe(server.url, **judge)]) == 0
        pairs = lines(tmp_path / "out/pairs.jsonl")
        assert pairs and all(len(p["chosen"]) > len(p["rejected"]) for p in pairs)
        assert {tuple(p["votes"].values()) for p in pairs} == {(4, 0, 0)}
        samples = lines(tmp_path / "out/samples.jsonl")
        chosen = [s["response"] for s in samples if s["decision"] == "chosen"]
        assert sorted(chosen) == sorted(p["chosen"] for p in pairs)
        num_asked, votes = len(server.requests), (tmp_path / "out/judgements.jsonl").read_bytes()
        # A judge that likes length, and lengths that must balance: no pair is left.
        assert main(["sample", recipe(server.url, **judge | {"pairs": {}})]) == 1
        assert lines(tmp_path / "out/pairs.jsonl") == []
        result = json.loads((tmp_path / "out/sample.json").read_text())
        assert result["length_bias_before"] > 0.05 and result["pairs"] == 0
        assert (tmp_path / "out/judgements.jsonl").read_bytes() == votes
        # The same answers, labelled.
        labels = recipe(server.url, output="labels", judge="my_data:is_safe")
        assert main(["sample", labels]) == 0
        assert len(server.requests) == num_asked
    found = lines(tmp_path / "out/labels.jsonl")
    assert {row["label"] for row in found} == {1}
    assert len(found) == len({(r["question"], normalize_question(r["response"])) for r in found})


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["key"])
def test_a_mistake_is_named_before_anything_is_asked(recipe, case):
    options = [
        word for key, value in case.get("options", {}).items() for word in (f"--{key}", value)
    ]
    with FakeServer(sums) as server:
        with refused(case["key"], Cause(case["cause"]), case.get("shows", "")):
            cli._dispatch_command(["sample", recipe(server.url, **case["sample"]), *options])
        assert not server.requests


def test_the_filter_that_drops_all_right_responses_is_named(recipe, capsys):
    with FakeServer(lambda q, b: (200, f"<answer>{2 * asked_number(q)}</answer>")) as server:
        assert main(["sample", recipe(server.url)]) == 1
    assert "sample.filters.format: false" in capsys.readouterr().err


def test_responses_of_a_run_without_thoughts_are_kept(tmp_path):
    def implied(**sections):
        (tmp_path / "config.yaml").write_text(json.dumps(sections))
        return from_run(str(tmp_path))[1]

    plain = {"data": {"template": "chat"}, "rewards": {"weights": {"accuracy": 1.0}}}
    assert implied(**plain)["sample.filters.format"] is False
    assert "sample.filters.format" not in implied(**plain | {"data": {"template": "r1_zero"}})
    assert "sample.filters.format" not in implied(data={"template": "chat"})


def test_where_nothing_is_kept_the_command_fails_and_says_why(recipe, tmp_path, capsys):
    with FakeServer(lambda q, b: (200, "I do not know.")) as server:
        assert main(["sample", recipe(server.url)]) == 1
    assert "wrong" in capsys.readouterr().err
    assert lines(tmp_path / "out/sft.jsonl") == []
    assert {s["decision"] for s in lines(tmp_path / "out/samples.jsonl")} == {"wrong"}


def test_answers_alone_are_graded_and_nothing_else(recipe, tmp_path):
    with FakeServer(sums) as server:
        assert main(["sample", recipe(server.url, output="responses", samples=1)]) == 0
    assert {s["decision"] for s in lines(tmp_path / "out/samples.jsonl")} <= {"kept", "wrong"}
    assert not (tmp_path / "out/sft.jsonl").exists()


@pytest.mark.more
def test_answers_that_no_grader_could_grade_are_graded_again(recipe, tmp_path):
    (tmp_path / "shaky.py").write_text(
        "from pathlib import Path\n"
        "from r1_grading import Grade\n"
        "def grade(response, truth, **entry):\n"
        "    if 'I think' not in response and truth == '6' and not Path('repaired').exists():\n"
        "        raise OSError('no sandbox')\n"
        "    return Grade(1.0, 'fine')\n"
    )
    rows = [{**row, "kind": "shaky:grade"} for row in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with FakeServer(sums) as server:
        arguments = ["sample", recipe(server.url, samples=2)]
        assert main(arguments) == 0
        decided = {s["question"]: s["decision"] for s in lines(tmp_path / "out/samples.jsonl")}
        assert decided["What is 3 + 3?"] == "ungraded" and decided["What is 4 + 4?"] == "kept"
        (tmp_path / "repaired").touch()
        assert main(arguments) == 0
        assert len(server.requests) == 12
    assert {s["decision"] for s in lines(tmp_path / "out/samples.jsonl")} == {"kept"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "response": "x"}\n')
    with refused("run.folder", Cause.CONFLICT, tmp_path / "samples.jsonl"):
        ResponseLog(tmp_path / "samples.jsonl", "sample")


def test_a_result_cache_survives_a_torn_line(tmp_path):
    cache = ResultCache(tmp_path / "cache.jsonl")
    cache["a", 1], cache["b",] = [1, 2], None
    with (tmp_path / "cache.jsonl").open("a") as file:
        file.write('{"key": "c')
    again = ResultCache(tmp_path / "cache.jsonl")
    assert again["a", 1] == [1, 2] and ("b",) in again and ("c",) not in again
    again["c",] = "é"
    assert [again["a", 1], again["c",], ResultCache(tmp_path / "cache.jsonl")["c",]] == [
        [1, 2],
        "é",
        "é",
    ]


def test_decisions_come_in_order_and_few_questions_are_in_memory_at_once(tmp_path):
    prompts = [make_prompt(f"{i}?", "math", i, {}) for i in range(300)]
    answers = [
        {"id": p.id, "digest": "d", "seed": 0, **TextResponse("x").to_line()} for p in prompts
    ]
    append_lines(tmp_path / "samples.jsonl", answers[::-1])  # as they were finished
    under_way, most = set(), 0

    async def decide(prompt, responses):
        nonlocal most
        under_way.add(prompt.id)
        most = max(most, len(under_way))
        await asyncio.sleep(0.001 * (int(prompt.question[:-1]) % 7))
        under_way.remove(prompt.id)
        return PromptResult([Decision("kept")] * len(responses), [])

    questions = PromptSet("", prompts, 1)

    async def run():
        log = ResponseLog(tmp_path / "samples.jsonl", "sample")
        return [lines[0]["id"] async for lines, _ in decide_all(log, questions, decide)]

    assert asyncio.run(run()) == [prompt.id for prompt in prompts]
    assert 1 < most <= WINDOW
