"""`megatron-r1 eval` against a served model: what it asks, writes, continues and refuses."""

import asyncio
import json
import re

import light_benchmark
import pytest
from fakes.openai_server import FakeServer
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.commands.cli import main
from megatron_r1.evaluation import remote_model
from megatron_r1.evaluation.identity import require_same_identity

PROBLEMS = [
    {"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)
]


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe for a server and returns its path."""
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, PROBLEMS)))

    def write(url, samples=3, benchmarks=None, server="", name=f"{light_benchmark.NAME}:BENCHMARK"):
        entry = benchmarks or [{"name": name, "label": "sums", "path": str(data)}]
        path = tmp_path / "eval.yaml"
        path.write_text(
            f"""
run: {{folder: {tmp_path}/out}}
rollout: {{max_response_tokens: 100}}
rewards: {{workers: 1, timeout_seconds: 600}}
eval:
  samples: {samples}
  benchmarks: {json.dumps(entry)}
  server: {{url: "{url}", model: m, concurrency: 2, retry_seconds: 600{server}}}
"""
        )
        return str(path)

    return write


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked_number(question):
    found = re.search(r"What is (\d+)", question)
    return int(found[1]) if found else 0


def right(question, body):
    return 200, rf"<think>easy</think> It is \boxed{{{2 * asked_number(question)}}}."


def test_every_sample_is_graded_and_can_be_audited(recipe, tmp_path, capsys):
    def reply(question, body):
        number = asked_number(question)
        if number == 3:  # never right
            return 200, r"\boxed{7}"
        wrong = number == 2 and body["seed"] % 2  # depends on the sample
        return 200, rf"\boxed{{{2 * number + wrong}}}"

    with FakeServer(reply) as server:
        assert main(["eval", recipe(server.url, name="aime_2024")]) == 0
    samples = lines(tmp_path / "out/samples.jsonl")
    assert len(samples) == 12 == len({(s["id"], s["index"]) for s in samples})
    assert len({s["seed"] for s in samples}) == 12
    by_id = {f"q{i}": [s for s in samples if s["id"] == f"q{i}"] for i in range(4)}
    assert all(s["reward"] == 1 and s["reason"].startswith("correct") for s in by_id["q1"])
    assert all(s["reward"] == 0 and "expected 6" in s["reason"] for s in by_id["q3"])
    share = sum(s["seed"] % 2 == 0 for s in by_id["q2"]) / 3
    result = json.loads((tmp_path / "out/eval.json").read_text())
    metrics = result["benchmarks"]["sums"]["metrics"]
    assert metrics["pass@1"]["value"] == pytest.approx((1 + 1 + share) / 4)
    assert metrics["pass@3"]["value"] == pytest.approx((2 + (share > 0)) / 4)
    assert metrics["cons@3"]["value"] == pytest.approx((2 + (share > 0.5)) / 4)
    assert metrics["length"]["value"] == 1
    assert metrics["pass@1"]["low"] <= metrics["pass@1"]["value"] <= metrics["pass@1"]["high"]
    asked = server.requests[0]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.6, 0.95, 100)
    assert set(server.paths) == {"/v1/chat/completions"}
    question = {q["id"]: q for q in lines(tmp_path / "out/questions.jsonl")}["q1"]
    assert "\\boxed{}" in question["question"] and question["truth"] == "2"
    assert (tmp_path / "out/eval.png").read_bytes()[:4] == b"\x89PNG"
    assert "expected 6" in (tmp_path / "out/report.html").read_text()
    assert "pass@1" in capsys.readouterr().out


@pytest.mark.more
def test_a_stopped_evaluation_continues_and_samples_nothing_twice(recipe, tmp_path, capsys):
    answered = []

    def fails_after_five(question, body):
        if body["max_tokens"] != 1:
            answered.append(body["seed"])
        return right(question, body) if len(answered) <= 5 else (401, "key expired")

    with FakeServer(fails_after_five) as server:
        assert main(["eval", recipe(server.url)]) == 1
    assert "key expired" in capsys.readouterr().err
    kept = lines(tmp_path / "out/samples.jsonl")
    assert 1 <= len(kept) <= 5 and not (tmp_path / "out/eval.json").exists()
    # A kill in the middle of a write leaves half a line.
    with (tmp_path / "out/samples.jsonl").open("a") as file:
        file.write('{"benchmark": "su')
    with FakeServer(right) as server:
        moved = recipe(server.url)  # on another port: the address may change
        assert main(["eval", moved]) == 0
        samples = lines(tmp_path / "out/samples.jsonl")
        assert len(samples) == 12 == len({(s["id"], s["index"]) for s in samples})
        assert len(server.requests) == 12 - len(kept)
        assert not {r["seed"] for r in server.requests} & {s["seed"] for s in kept}
        # Once more: nothing is left to ask. More samples: only the new ones.
        assert main(["eval", moved]) == 0
        assert len(server.requests) == 12 - len(kept)
        assert main(["eval", moved, "--eval.samples", "4"]) == 0
        assert len(server.requests) == 16 - len(kept)


def test_a_changed_setting_that_matters_is_refused_by_name(recipe):
    changes = {
        "eval.temperature": ("1.0", 0.6, 1.0),
        "rollout.max_response_tokens": ("50", 100, 50),
        "run.seed": ("1", 0, 1),
        "eval.server.model": ("other", "m", "other"),
        "eval.server.api": ("completions", "chat", "completions"),
    }
    with FakeServer(right) as server:
        path = recipe(server.url, samples=1)
        assert main(["eval", path]) == 0
        num_asked = len(server.requests)
        for key, (value, before, now) in changes.items():
            with refused(key, Cause.CHANGED, before, now):
                cli._dispatch_command(["eval", path, f"--{key}", value])
        assert len(server.requests) == num_asked


@pytest.mark.parametrize("models", [("runs/mine", "models/base"), ("runs/mine", "runs/mine")])
def test_the_folder_of_another_model_is_refused_with_both_models(tmp_path, models):
    path = tmp_path / "identity.json"
    require_same_identity(path, {"weights": "c716", "run.seed": 0}, False, models)
    require_same_identity(path, {"weights": "c716", "run.seed": 0}, True, models)
    with refused("weights", Cause.CHANGED, "c716", "3efe", *models) as refusal:
        require_same_identity(path, {"weights": "3efe", "run.seed": 0}, True, models)
    assert "run.seed" not in str(refusal.value)


def test_a_mistyped_start_leaves_nothing_to_agree_with(recipe, capsys):
    with FakeServer(lambda q, b: (404, "no such model")) as server:
        wrong = recipe(server.url, samples=1)
        assert main(["eval", wrong, "--eval.server.model", "typo"]) == 1
    assert "no such model" in capsys.readouterr().err
    with FakeServer(right) as server:
        assert main(["eval", recipe(server.url, samples=1)]) == 0


def test_the_folder_of_a_training_run_is_not_written_into(recipe, tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "metrics.jsonl").write_text('{"step": 1}\n')
    with FakeServer(right) as server, refused("run.folder", Cause.EXISTS, trained):
        cli._dispatch_command(["eval", recipe(server.url), "--run.folder", str(trained)])
    assert [p.name for p in trained.iterdir()] == ["metrics.jsonl"]


def test_a_changed_question_is_refused_by_name(recipe, tmp_path):
    with FakeServer(right) as server:
        path = recipe(server.url, samples=1)
        assert main(["eval", path]) == 0
        data = tmp_path / "sums.jsonl"
        data.write_text(data.read_text().replace("What is 2 + 2?", "What is 2 plus 2?"))
        with refused("run.folder", Cause.CHANGED, "sums", "q2"):
            cli._dispatch_command(["eval", path])


@pytest.mark.more
def test_cut_answers_and_thoughts_of_their_own_field(recipe, tmp_path):
    def reply(question, body):
        number = asked_number(question)
        message = {"role": "assistant", "content": rf"\boxed{{{2 * number}}}"}
        if number == 1:  # a thought apart, as servers with a reasoning parser send it
            message["reasoning_content"] = r"maybe \boxed{99}"
        if number == 2:  # cut inside that thought
            message |= {"content": None, "reasoning_content": r"perhaps \boxed{4}"}
        cut = number in (2, 3)  # 3: cut in a thought that the server's template opened
        return 200, {
            "choices": [{"finish_reason": "length" if cut else "stop", "message": message}]
        }

    with FakeServer(reply) as server:
        assert main(["eval", recipe(server.url, samples=1, name="aime_2024")]) == 0
    samples = {s["id"]: s for s in lines(tmp_path / "out/samples.jsonl")}
    assert [samples[f"q{i}"]["reward"] for i in range(4)] == [1, 1, 0, 0]
    assert [samples[f"q{i}"]["truncated"] for i in range(4)] == [False, False, True, True]
    assert "<think>\nmaybe" in samples["q1"]["response"]
    result = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]["sums"]
    assert result["metrics"]["truncated"]["value"] == 0.5 and result["counts"]["truncated"] == 2
    assert "length" not in result["metrics"]  # this server does not count tokens
    assert result["counts"]["without_length"] == 4


def test_a_refused_question_costs_one_sample_and_wrong_limits_the_run(recipe, tmp_path, capsys):
    def too_long(question, body):
        return (400, "prompt too long") if asked_number(question) == 1 else right(question, body)

    def never(question, body):
        return (400, "max_tokens too large") if body["max_tokens"] > 1 else (200, "2")

    with FakeServer(too_long) as server:
        assert main(["eval", recipe(server.url, samples=1)]) == 0
    samples = {s["id"]: s for s in lines(tmp_path / "out/samples.jsonl")}
    assert samples["q1"]["refused"] and "prompt too long" in samples["q1"]["reason"]
    assert samples["q2"]["reward"] == 1
    with FakeServer(never) as server:
        arguments = ["--run.folder", str(tmp_path / "other")]
        assert main(["eval", recipe(server.url), *arguments]) == 1
    assert "max_tokens too large" in capsys.readouterr().err
    assert not (tmp_path / "other/samples.jsonl").exists()


def test_busy_servers_are_asked_again_and_keys_come_from_the_environment(
    recipe, tmp_path, monkeypatch
):
    busy = {"left": 3}

    def reply(question, body):
        busy["left"] -= 1
        return (503, "loading") if busy["left"] >= 0 else right(question, body)

    monkeypatch.setenv("EVAL_TEST_KEY", "secret-1")
    with FakeServer(reply) as server:
        path = recipe(server.url, samples=1, server=", api_key_env: EVAL_TEST_KEY")
        assert main(["eval", path]) == 0
        assert {h["Authorization"] for h in server.headers} == {"Bearer secret-1"}
        for file in (tmp_path / "out").iterdir():
            assert not file.is_file() or b"secret-1" not in file.read_bytes()
        monkeypatch.delenv("EVAL_TEST_KEY")
        with refused("eval.server.api_key_env", Cause.NOT_FOUND, "EVAL_TEST_KEY"):
            cli._dispatch_command(["eval", path])


def test_waiting_for_a_loading_server_is_reported(recipe, capsys, monkeypatch):
    monkeypatch.setattr(remote_model, "REPORT_SECONDS", 0.05)
    busy = {"left": 2}

    def reply(question, body):
        busy["left"] -= 1
        return (503, "loading the weights") if busy["left"] >= 0 else right(question, body)

    with FakeServer(reply) as server:
        assert main(["eval", recipe(server.url, samples=1)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert server.url in first
    assert [line for line in others if "503" in line and "loading the weights" in line], others


def test_an_address_where_nobody_listens_is_named_at_once(recipe, capsys):
    with FakeServer(right) as server:
        url = server.url  # free again afterwards
    assert main(["eval", recipe(url), "--eval.server.wait_seconds", "0"]) == 1
    printed = capsys.readouterr()
    assert url in printed.err and "eval.server.wait_seconds" in printed.err


def test_a_server_may_come_up_late(recipe):
    async def run():
        listening, failures = [], []

        async def listen(port):
            listening.append(await asyncio.start_server(lambda r, w: None, "127.0.0.1", port))

        def failed(reason):
            failures.append(asyncio.create_task(listen(port)))

        await listen(0)
        port = listening[0].sockets[0].getsockname()[1]
        listening.pop().close()
        url = f"http://127.0.0.1:{port}/v1"
        await remote_model.wait_until_listening(url, 3600, failed)
        assert len(failures) == len(listening) == 1
        listening.pop().close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("option", "value", "key", "cause"),
    [
        ("model.path", "runs/mine", "eval.server", Cause.CONFLICT),
        ("eval.server.url", "http://", "eval.server.url", Cause.MALFORMED),
        ("eval.server.url", "http://a:99999", "eval.server.url", Cause.MALFORMED),
    ],
)
def test_a_mistake_is_named_before_anything_is_asked(recipe, option, value, key, cause):
    with FakeServer(right) as server:
        with refused(key, cause, value):
            cli._dispatch_command(["eval", recipe(server.url), f"--{option}", value])
        assert not server.requests


@pytest.mark.more
def test_completions_get_the_template_and_gym_needs_no_data(recipe, tmp_path):
    def reply(question, body):
        return 200, "<think>no idea</think><answer>0</answer>"

    suite = [{"name": "gym/chain_sum", "options": {"questions": 3}, "label": "sums"}]
    with FakeServer(reply) as server:
        path = recipe(server.url, samples=2, benchmarks=suite, server=", api: completions")
        assert main(["eval", path]) == 0
    assert set(server.paths) == {"/v1/completions"}
    assert all(r["prompt"].startswith("A conversation between") for r in server.requests)
    result = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]["sums"]
    assert result["counts"] == {
        **{"questions": 3, "samples": 6, "right": 0, "truncated": 0},
        **{"ungraded": 0, "without_length": 0, "without_answer": 0},
    }
    assert result["metrics"]["cons@2"] == {"value": 0, "low": 0, "high": 0}


def test_a_broken_grader_stops_the_run_and_its_samples_are_graded_again(
    recipe, tmp_path, monkeypatch
):
    (tmp_path / "shaky_grader.py").write_text(
        "from pathlib import Path\n"
        "from r1_grading import Grade\n"
        "def grade(response, truth, **entry):\n"
        "    if '<answer>' in response: return Grade(0.0, 'only tried')\n"
        f"    if not Path({str(tmp_path / 'repaired')!r}).exists():\n"
        "        raise OSError('no sandbox')\n"
        "    return Grade(1.0, 'fine')\n"
    )
    (tmp_path / "shaky_bench.py").write_text(
        "from megatron_r1.evaluation.benchmarks.base import Benchmark, Question\n"
        "def questions(rows, options):\n"
        "    for i in range(options['size']):\n"
        "        yield Question(str(i), f'{i}?', 'shaky_grader:grade', None)\n"
        "BENCHMARK = Benchmark(questions, options={'size': 30})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with FakeServer(right) as server:
        path = recipe(server.url, samples=1, benchmarks=["shaky_bench:BENCHMARK"])
        with refused("rewards", Cause.FAILED, "shaky_grader", "no sandbox"):
            cli._dispatch_command(["eval", path])
        num_asked = len(server.requests)
        assert num_asked < 30
        (tmp_path / "repaired").touch()
        assert main(["eval", path]) == 0
        # Of the two under way at once, one was not finished when the run stopped.
        assert len({r["seed"] for r in server.requests}) == 30 >= len(server.requests) - 1
    result = json.loads((tmp_path / "out/eval.json").read_text())
    counts = result["benchmarks"]["shaky_bench:BENCHMARK"]["counts"]
    assert (counts["right"], counts["ungraded"]) == (30, 0)
