"""The environments that come with the package, called directly."""

import json
import random
import signal

import pytest
from r1_grading.sandbox.programs import require_sandbox
from r1_grading.sandbox.requirements import SandboxUnavailable

from megatron_r1.agents.environment import (
    SHIPPED_ENVIRONMENTS,
    describe_environment,
    find_environment,
)
from megatron_r1.agents.environment_prompts import load_environment_prompts
from megatron_r1.agents.method_arguments import row_arguments
from megatron_r1.agents.shipped_environments import Calculator, Gym, Lookup, Python, Retrieval

LONG = 10_000.0
"""Seconds that only what hangs reaches."""


def test_all_have_documented_tools():
    for path in SHIPPED_ENVIRONMENTS.values():
        for tool in describe_environment(find_environment(path)).tools:
            function = tool["function"]
            assert function["description"], path
            assert all(p["description"] for p in function["parameters"]["properties"].values())


def test_calculator_computes_as_python_does_and_refuses_the_rest():
    game, rng = Calculator(), random.Random(0)
    for _ in range(200):
        terms = [str(rng.randrange(1, 100)) for _ in range(4)]
        text = terms[0] + "".join(rng.choice("+-*") + term for term in terms[1:])
        assert game.calculate(text) == str(eval(text))
    assert (game.calculate("-(1 + 2) / 6"), game.calculate("0.5*4")) == ("-1/2", "2")
    for text in ("2**9", "abs(1)", "True", "1 if 1 else 2", "9" * 300, "'a'", "1 +"):
        with pytest.raises((ValueError, SyntaxError)):
            game.calculate(text)
    game.reset(question="?", truth=42)
    for answer, reward in (("It is 42", 1.0), ("42 or 41", 0.0), ("", 0.0)):
        game.final_answer(answer)
        assert game.get_reward() == reward


def test_lookup_has_the_same_table_for_a_row_and_another_for_the_next():
    def answer(seed):
        game = Lookup()
        key = game.reset(seed=seed, question="?")
        result = game.lookup(game.lookup(key))
        game.final_answer(f" {result} ")
        assert game.get_reward() == 1.0
        return key, result

    answers = [answer(seed) for seed in range(300)]
    assert answers == [answer(seed) for seed in range(300)]
    assert len(set(answers)) > 250
    with pytest.raises(KeyError):
        Lookup().lookup("7")


@pytest.mark.more
def test_gym_lets_a_wrong_answer_be_mended_for_half_of_the_reward():
    rows = load_environment_prompts(
        "gym", path=None, task="chain_sum", num_train=20, num_heldout=5, heldout_fraction=0.2
    )
    assert {prompt.kind for prompt in rows.train + rows.heldout} == {"environment"}
    for prompt in rows.train:
        game = Gym()
        row = {"question": prompt.question, "truth": prompt.truth, **prompt.fields}
        game.reset(**row_arguments(game.reset, row))
        assert game.submit("1e9") == "wrong; attempts left: 2"
        assert (game.submit(prompt.truth), game.done) == ("right", True)
        game.final_answer("never")
        assert game.get_reward() == 0.5
        again = Gym(attempts=2)
        again.reset(**row_arguments(game.reset, row))
        again.final_answer(f" {prompt.truth}\n")
        assert (again.get_reward(), again.done) == (1.0, True)
        again = Gym(attempts=2)
        again.reset(**row_arguments(game.reset, row))
        answers = [again.submit("</answer>"), again.submit("")]
        assert answers == ["wrong; attempts left: 1", "wrong; attempts left: 0"] and again.done
        again.final_answer(prompt.truth)
        assert again.get_reward() == 0.0
    with pytest.raises(ValueError, match="attempts=0"):
        Gym(attempts=0)


def test_retrieval_finds_the_document_and_any_text_is_a_query(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [
        {"title": f"Town {i}", "text": f"Town {i} lies on river R{i % 7}. " * 9} for i in range(99)
    ]
    rows.append({"title": "Zürich", "text": "It's on the Limmat."})
    corpus.write_text("\n".join(map(json.dumps, rows)))
    game = Retrieval(str(corpus))
    found = game.search("Which river is Zürich on?")
    assert found[0]["title"] == "Zürich"
    assert game.read(found[0]["number"]) == "Zürich\nIt's on the Limmat."
    for query in ('"', "AND NOT (", "título:x*", ""):
        assert isinstance(game.search(query, 10**6), list)
    with pytest.raises(KeyError):
        game.read(10**6)
    index = corpus.with_name("corpus.jsonl.fts5")
    before = index.stat().st_mtime_ns
    Retrieval(str(corpus))
    assert index.stat().st_mtime_ns == before


def test_an_index_that_cannot_be_written_leaves_no_file(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n{"title": "without text"}\n')
    with pytest.raises(KeyError, match="text"):
        Retrieval(str(corpus))
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.fixture(scope="module")
def one_interpreter():
    try:
        require_sandbox("python")
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))
    game = Python(seconds=LONG)
    yield game
    game.close()


@pytest.fixture
def interpreter(one_interpreter):
    one_interpreter._seconds = LONG
    return one_interpreter


def test_python_keeps_its_variables_and_reports_errors(interpreter, monkeypatch):
    monkeypatch.setattr("r1_grading.sandbox.python_session.GRACE_SECONDS", LONG)
    run = interpreter.python
    assert run("x = 12 * 34\nx") == "408\n"
    assert run("print(x + 1); x - 1") == "409\n407\n"
    assert run("def f(n):\n    return n / 0") == "(no output)"
    assert run("f(x)") == "ZeroDivisionError: division by zero (line 1, 2 of the cell)\n"
    assert run("x +").startswith("SyntaxError")
    interpreter._seconds = 0.5
    assert run("while True: pass").startswith("TimeoutError: ")
    interpreter._seconds = LONG
    assert run("len(str(2 ** 20000))") == "6021\n"
    assert run("print('y' * 9000)").endswith("y … (cut off)")
    assert run("exit()") == "(no output)"
    assert run("x") == "408\n"


HOSTILE = {
    "write": "open('/work/a', 'w')",
    "socket": "import socket; socket.socket()",
    "fork": "import os; os.fork()",
    "program": "import subprocess; subprocess.run(['/bin/sh', '-c', 'id'])",
    "home": "import os; os.listdir('/root') or os.listdir('/home')",
    "memory": "a = bytearray(2 ** 31)",
}
ENDING = {
    "os._exit": "import os; os._exit(0)",
    "no interrupt": "import signal; signal.signal(14, signal.SIG_IGN)\nwhile True: pass",
    "C code": "import itertools; sum(itertools.repeat(0))",
    "output": "print('y' * 10 ** 8)",
    "forged frame": "import posix; posix.write(4, b'\\xff' * 9)",
    "closed pipe": "import posix; posix.closerange(0, 20)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_python_survives_what_the_walls_refuse(interpreter, name):
    assert "Error: " in interpreter.python(HOSTILE[name])
    assert interpreter.python("1 + 1") == "2\n"


@pytest.mark.parametrize("name", ENDING)
def test_an_interpreter_that_is_lost_is_replaced(interpreter, name):
    if name in ("no interrupt", "C code"):  # the call's time is what ends these
        interpreter._seconds = 0.5

    def use():
        interpreter.python(ENDING[name])
        interpreter.python("0")  # where the damage shows later

    with pytest.raises(RuntimeError):
        use()
    interpreter._seconds = LONG
    assert interpreter.python("1 + 1") == "2\n"


def test_a_cell_that_an_alarm_interrupts_leaves_no_reply_for_the_next(interpreter):
    class Alarm(BaseException):
        pass

    def ring(*_):
        raise Alarm

    interpreter.python("x = 1")
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Alarm):
            interpreter.python("import time; time.sleep(100_000); 'late'")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interpreter.python("1 + 1") == "2\n"
    with pytest.raises(ValueError, match="32,768"):
        interpreter.python("#" * 2**16)
