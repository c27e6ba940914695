"""`megatron-r1 score`: as many lines out as in, whatever they hold."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
from waiting import wait_until

from megatron_r1.base.errors import UserError
from megatron_r1.commands.cli import main
from megatron_r1.commands.score import line_scoring
from megatron_r1.commands.score import verb as score
from megatron_r1.config import Config

GRADERS = """
import os, time
from r1_grading import Grade

def nap(response, truth, **entry):
    time.sleep(float(response))
    return Grade(1.0, "rested")

def leave(response, truth, **entry):
    os._exit(3)

def echo(response, truth, **entry):
    return Grade(0.5, repr((response, truth, entry)))
"""
GOOD = "<think>a</think><answer>13</answer>"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scored(folder, lines, *options):
    """The output's lines for these: bytes as they are, anything else as JSON."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "in.jsonl").write_bytes(b"\n".join(encoded) + b"\n")
    assert main(["score", "in.jsonl", "out.jsonl", *options]) == 0
    out = (folder / "out.jsonl").read_bytes().decode().splitlines()
    assert len(out) == len(lines)
    return [json.loads(line) for line in out]


def test_lines_come_back_in_order_with_all_they_had(folder):
    lines = [
        {"kind": "graders:nap", "response": f"{0.05 * (i % 3)}", "id": i, "more": {"a": [None, i]}}
        for i in range(12)
    ]
    graded = scored(folder, lines)
    assert graded == [line | {"reward": 1.0, "reason": "rested"} for line in lines]


def test_a_kind_may_be_given_for_the_lines_that_name_none(folder, capsys):
    lines = [
        {"response": GOOD, "truth": "13"},
        {"kind": "graders:nap", "response": "0"},
        {"kind": "maths", "response": GOOD},
    ]
    graded = scored(folder, lines, "--data.kind", "math", "--rewards.workers", "1")
    assert [line["reward"] for line in graded] == [1.0, 1.0, 0.0]
    assert [line["kind"] for line in graded] == ["math", "graders:nap", "maths"]
    assert "maths" in capsys.readouterr().out


UNGRADABLE = [
    # The good lines between these have the odd numbers.
    (b"not json", "line 2 "),
    (b"", "line 4 "),
    (b" \r", "line 6 "),
    (b'{"kind": "math"', "line 8 "),
    (b"\xff\xfe", "line 10 "),
    (b"[" * 100_000, "line 12 "),
    (b"[1, 2]", "line 14 "),
    ({"response": "x"}, "'kind'"),
    ({"response": GOOD, "truth": "13"}, "--data.kind"),
    ({"kind": 3, "response": "x"}, "int"),
    ({"kind": "math", "truth": "13"}, "'response'"),
    ({"kind": "math", "response": None}, "NoneType"),
    ({"kind": "maths", "response": GOOD}, "'math'"),
    ({"kind": "math", "response": GOOD}, "truth"),
    ({"kind": "math", "response": GOOD, "truth": {"a": "13"}}, "truth"),
    ({"kind": "language", "response": GOOD}, "rewards.options.language.target"),
    ({"kind": "conciseness", "response": GOOD}, "free_length, max_len"),
    ({"kind": "judge", "response": GOOD, "question": "?"}, "url"),
    ({"kind": "language", "response": GOOD, "target": "fr"}, "'fr'"),
    ({"kind": "logic", "response": GOOD}, "task, entry"),
    ({"kind": "nowhere:reward", "response": GOOD}, "'nowhere'"),
    ({"kind": "nowhere.at.all:reward", "response": GOOD}, "nowhere.at.all:reward"),
    ({"kind": "graders:missing", "response": GOOD}, "graders.py"),
    ({"kind": "builtins:exec", "response": "open('trace', 'w')", "truth": {}}, "builtins:exec"),
    ({"kind": "os:system", "response": "touch trace"}, "os:system"),
]


@pytest.mark.more
def test_a_line_that_cannot_be_graded_gets_0_and_stops_no_other(folder):
    good = {"kind": "math", "response": GOOD, "truth": "13"}
    lines = [line for bad, _ in UNGRADABLE for line in (good, bad)]
    graded = scored(folder, [*lines, good], "--rewards.workers", "1")
    assert all(line["reward"] == 1.0 for line in graded[::2])
    for line, (_, reason) in zip(graded[1::2], UNGRADABLE, strict=True):
        assert line["reward"] == 0.0, line
        assert reason in line["reason"], line
    assert not (folder / "trace").exists()


def test_a_file_of_which_no_line_can_be_graded_is_a_failure_once_it_is_written(folder, capsys):
    (folder / "in.jsonl").write_text('{"kind": "maths", "response": "13"}\n\n')
    assert main(["score", "in.jsonl", "out.jsonl"]) == 1
    assert [json.loads(line)["reward"] for line in (folder / "out.jsonl").open()] == [0.0, 0.0]
    said = capsys.readouterr().err
    assert "out.jsonl" in said and "maths" in said


def test_any_field_and_any_integer_reaches_the_reward(folder):
    lines = [
        {"kind": "graders:echo", "response": "x", "entry": 1, "self": 2},
        {"kind": "graders:echo", "response": "x", "truth": 10**30},
    ]
    reasons = [line["reason"] for line in scored(folder, lines)]
    assert reasons == ["('x', None, {'entry': 1, 'self': 2})", f"('x', {10**30}, {{}})"]


@pytest.mark.more
def test_a_grader_that_hangs_or_dies_costs_its_own_line(folder, capsys):
    lines = [{"kind": "graders:nap", "response": "1e5"}, {"kind": "graders:leave", "response": ""}]
    fine = [{"kind": "format", "response": GOOD}] * 4
    graded = scored(folder, lines + fine, "--rewards.timeout_seconds", "5")
    assert [line["reward"] for line in graded] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert "5 s" in graded[0]["reason"]
    summary = capsys.readouterr().out
    counts = r"6 lines, 6 graded, 0 .*, 1 timed out, 2 crashes.*, 0 out of memory; "
    means = r".*format 1\.000 \(4\), graders:leave 0\.000 \(1\), graders:nap 0\.000 \(1\)"
    assert re.search(counts + means, summary), summary


def test_a_line_that_was_scored_before_is_scored_anew(folder):
    line = {
        "kind": "graders:echo",
        "reward": 1.0,
        "reason": "old",
        "response": "x",
        "thought_opened": True,
    }
    (graded,) = scored(folder, [line])
    assert graded["reward"] == 0.5 and graded["reason"] == "('x', None, {'thought_opened': True})"


def test_a_former_name_of_a_field_is_refused(folder):
    line = {"kind": "graders:echo", "response": "x"}
    former, _ = scored(folder, [line | {"opened": False}, line])
    assert former["reward"] == 0 and "thought_opened" in former["reason"]


def test_options_reach_the_reward_and_the_line_wins(folder):
    lines = [{"kind": "language", "response": "<think>we add</think>"} for _ in range(2)]
    lines[1]["target"] = "en"
    graded = scored(folder, lines, "--rewards.options.language.target", "zh")
    assert [line["reward"] for line in graded] == [0.0, 1.0]


def test_text_that_utf8_has_no_form_for_survives(folder):
    lines = [
        b'{"kind": "format", "response": "\\ud800", "x": NaN}',
        {"kind": "é", "response": "和"},
    ]
    graded = scored(folder, lines)
    assert graded[0]["response"] == "\ud800" and graded[0]["x"] != graded[0]["x"]
    assert "和" in (folder / "out.jsonl").read_text(encoding="utf-8")
    assert graded[1]["kind"] == "é"


def test_no_more_is_in_memory_than_the_limits_say(folder, monkeypatch):
    pools = []

    class Watched(line_scoring.RewardPool):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr(line_scoring, "RewardPool", Watched)
    monkeypatch.setattr(line_scoring, "BATCH_BYTES", 1)
    monkeypatch.setattr(line_scoring, "MAX_OUTSTANDING_LINES", 5)
    lines = [{"kind": "graders:nap", "response": "0", "id": i} for i in range(60)]
    assert [line["id"] for line in scored(folder, lines)] == list(range(60))
    assert 2 <= pools[0].most_outstanding <= 6
    monkeypatch.setattr(line_scoring, "MAX_OUTSTANDING_LINES", 1000)
    monkeypatch.setattr(line_scoring, "MAX_OUTSTANDING_BYTES", 3 * len(json.dumps(lines[-1])))
    assert len(scored(folder, lines)) == 60
    assert pools[1].most_outstanding <= 5


def test_a_line_too_long_to_hold_is_skipped_whole(folder, monkeypatch):
    monkeypatch.setattr(line_scoring, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(line_scoring, "BATCH_BYTES", 100)
    fine = {"kind": "format", "response": GOOD}
    # The second ends exactly at the limit; the last has no line break.
    exact = b'{"kind": "format", "response": "' + b"x" * (999 - 34) + b'"}'
    lines = [{"response": "x" * 5000}, exact, fine, {"response": "x" * 1000}]
    too_long, at_limit, after, last = scored(folder, lines)
    assert too_long == last | {"reason": too_long["reason"]}
    assert "1,000" in too_long["reason"]
    assert "<think>" in at_limit["reason"] and after["reward"] == 1.0


def test_the_output_appears_whole_or_not_at_all(folder, monkeypatch):
    line = json.dumps({"kind": "format", "response": GOOD}) + "\n"
    (folder / "in.jsonl").write_text(line * 3)
    (folder / "out.jsonl").write_text("before\n")
    written = []

    def fail_later(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return b"{}\n"

    with monkeypatch.context() as patch:
        patch.setattr(line_scoring, "_encode_graded", fail_later)
        assert main(["score", "in.jsonl", "out.jsonl"]) == 130
    assert (folder / "out.jsonl").read_text() == "before\n"
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    assert main(["score", "in.jsonl", "out.jsonl"]) == 0
    assert (folder / "out.jsonl").read_text().count('"reward": 1.0') == 3


def run_piped(folder, lines):
    return subprocess.run(
        [sys.executable, "-m", "megatron_r1", "score", "-", "-"],
        input=lines,
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.more
def test_pipes_carry_the_lines_and_nothing_else(folder):
    line = json.dumps({"kind": "format", "response": GOOD})
    done = run_piped(folder, f"{line}\n{line}".encode())
    assert done.returncode == 0, done.stderr
    assert [json.loads(out)["reward"] for out in done.stdout.splitlines()] == [1.0, 1.0]
    summary = done.stderr.splitlines()[-1]  # behind the progress, which a slow machine prints
    assert summary.startswith(b"score: 2 lines, 2 graded")
    nothing = run_piped(folder, b"")
    assert (nothing.returncode, nothing.stdout) == (0, b"")
    assert b"0 lines, 0 graded" in nothing.stderr


@pytest.mark.more
def test_a_service_that_is_down_ends_in_a_failure_once_all_lines_are_written(folder, capsys):
    service = {"url": "http://127.0.0.1:9/v1", "model": "m", "retry_seconds": 0.1}
    lines = [
        {"kind": "judge", "response": GOOD, "truth": "13", "question": "6 + 7 =", **service},
        {"kind": "math", "response": GOOD, "truth": "13"},
    ]
    encoded = "\n".join(json.dumps(line) for line in lines)
    (folder / "in.jsonl").write_text(encoded + "\n")
    assert main(["score", "in.jsonl", "out.jsonl"]) == 1
    judged, math = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert judged["reward"] == 0.0 and "127.0.0.1:9" in judged["reason"]
    assert math["reward"] == 1.0
    assert "lines: 1;" in capsys.readouterr().err


def test_ctrl_c_ends_it_while_a_pipe_is_silent(folder):
    (folder / "graders.py").write_text(
        GRADERS + "def note(response, truth, **entry):\n    open(response, 'w').close()\n"
    )
    graded = folder / "graded"
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_r1", "score", "-", "out.jsonl"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # A shell's background jobs ignore Ctrl-C, and so would what the tests start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        process.stdin.write(json.dumps({"kind": "graders:note", "response": str(graded)}).encode())
        process.stdin.write(b"\n")
        process.stdin.flush()  # it stays open
        wait_until(graded.exists)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    finally:
        process.kill()
        _, said = process.communicate()
    assert b"stopped" in said and b"Traceback" not in said
    assert not (folder / "out.jsonl").exists()


def audited(folder, lines, *options):
    """The result of an audit of these lines, as --json has it."""
    (folder / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["score", "--audit", "graded.jsonl", "--json", "audit.json", *options]
    assert main([*command, "--rewards.workers", "1"]) == 0
    return json.loads((folder / "audit.json").read_text())


def test_an_audit_of_a_file_finds_the_wrong_verdicts_by_data_source(folder, capsys):
    def line(truth, answer, reward, source, question):
        response = f"<think>a</think><answer>{answer}</answer>"
        known = {"kind": "math", "data_source": source, "question": question}
        return known | {"response": response, "truth": truth, "reward": reward}

    lines = [
        line("13", "13", 1.0, "sums", "a"),
        line("13", "14", 0.0, "sums", "a"),
        line("1/2", r"\frac{1}{2}", 0.0, "halves", "b"),  # wrongly rejected
        line("1/2", "0.5", 1.0, "halves", "b"),
        line("1/2", "3", 1.0, "halves", "b"),  # wrongly accepted
        {"kind": "judge", "response": "", "reward": 1.0},
        {"line": "}", "reward": 0.0, "reason": "cannot be graded: line 7 is not JSON"},
    ]
    result = audited(folder, lines)
    assert (result["answers"], result["ungraded"]) == (5, 1)
    assert result["without_second_method"] == {"judge": 1}
    assert result["sources"]["halves"]["wrongly_rejected"]["value"] == 1.0
    assert result["sources"]["halves"]["wrongly_accepted"]["value"] == 0.5
    assert result["sources"]["sums"]["wrongly_rejected"]["high"] == 0.0
    places = [(each["place"], each["outcome"]) for each in result["concerned"]]
    assert sorted(places) == [("graded.jsonl:3", "wrong"), ("graded.jsonl:5", "wrong")]
    # Corrected, group b has rewards 1, 1, 0 in place of 0, 1, 1.
    assert result["advantages"]["sign_changes"]["value"] == 0.5
    change = 3 / 2**0.5 * 2 / 3
    assert result["advantages"]["mean_change"]["value"] == pytest.approx(change / 2, rel=1e-5)
    out = capsys.readouterr().out
    assert "halves" in out and "graded.jsonl:3" in out and "judge" in out


@pytest.mark.parametrize(
    ("options", "outcome"), [((), "undecided"), (("--verifier", "math-verify"), "wrong")]
)
def test_an_audit_of_math_verify_does_not_ask_math_verify(folder, options, outcome):
    """math-verify accepts 3, 5, 5 for 3, 3, 5; values at points do not."""
    line = {"kind": "math", "response": "<answer>3,5,5</answer>", "truth": "3,3,5", "reward": 1.0}
    result = audited(folder, [line], *options)
    assert [each["outcome"] for each in result["concerned"]] == [outcome]


BAD_AUDITS = [
    (b'{"kind": "math", "response": "1", "truth": "1"}\n', (), "reward", "graded.jsonl:1"),
    (b'{"response": "1", "reward": 1, "truth": "1"}\n', (), "kind", "--data.kind"),
    (b'{"kind": "math", "response": "1", "reward": "1"}\n', (), "reward", "malformed"),
    (b'{"kind": "math", "reward": 1}\n', (), "response", "graded.jsonl:1"),
    (b"nothing\n", (), "--audit", "graded.jsonl:1"),
    (b"[1]\n", (), "--audit", "graded.jsonl:1"),
    (b"", (), "--audit", "graded.jsonl"),
    (b'{"kind": "math", "response": "1", "truth": "1", "reward": NaN}\n', (), "reward", ":1"),
    (b'{"kind": "math", "response": "1", "reward": 1}\n', (), "truth", "graded.jsonl:1"),
    (b'{"kind": "math", "response": "1", "truth": null, "reward": 1}\n', (), "truth", "missing"),
    (b'{"kind": "judge", "response": "1", "reward": 1}\n', (), "--audit", "judge"),
    (b"", ("--size", "0"), "--size", "0"),
    (b"", ("--seed", "x"), "--seed", "x"),
    (b"", ("--verifier", "mine"), "--verifier", "math-verify"),
]


@pytest.mark.parametrize(("content", "options", "key", "shown"), BAD_AUDITS)
def test_a_file_that_cannot_be_audited_is_refused(folder, content, options, key, shown):
    (folder / "graded.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        score.run(Config(), audit="graded.jsonl", **_options(options))
    assert caught.value.key == key
    assert shown in str(caught.value)


def _options(texts):
    return {name[2:]: value for name, value in zip(texts[::2], texts[1::2], strict=True)}
