"""Answers that go for the comparison, the harness or the checker instead of the problem."""

import uuid

import pytest
from code_answers import PATIENT, fenced, named_sandboxes, needs_sandbox
from r1_grading import Grade, code

pytestmark = needs_sandbox
SECRET = "expected-7041776"
CALL = {"function": "solve", "tests": [{"args": [20, 22], "result": 42}]}
TEXT = {"function": "solve", "tests": [{"args": ["key"], "result": SECRET}]}
CHECKED = {
    "tests": [{"stdin": "10", "stdout": "2 5"}],
    "checker": "import sys\nn, _, a = (open(p).read().split() for p in sys.argv[1:])\n"
    "assert len(a) == 2 and int(a[0]) * int(a[1]) == int(n[0])\nprint('true')",
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    with named_sandboxes(f"test-{uuid.uuid4().hex}"):
        yield


def grade(program: str, truth: dict) -> Grade:
    return code.grade(fenced(program), truth, limits=PATIENT)


def test_the_honest_answers_are_paid():
    assert grade("def solve(a, b): return a + b", CALL).reward == 1.0
    assert grade("n = int(input())\nprint(2, n // 2)", CHECKED).reward == 1.0


ALWAYS_EQUAL = """
class Same({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __repr__(self): return '42'
    def __str__(self): return '42'
def solve(a, b): return Same({value})
"""
FORGED = [
    ALWAYS_EQUAL.format(base="object", value=""),
    ALWAYS_EQUAL.format(base="int", value="1"),
    ALWAYS_EQUAL.format(base="str", value="'x'"),
    ALWAYS_EQUAL.format(base="list", value="[]"),
    "import sys\nsys.exit(0)\ndef solve(a, b): return a + b",
    "import os\nos._exit(0)\ndef solve(a, b): return a + b",
    "raise SystemExit(0)",
    "def solve(a, b): exit(0)",
    "import builtins\nbuiltins.abs = builtins.all = builtins.isinstance = lambda *_: True\n"
    "def solve(a, b): return 0",
    "import json\njson.dumps = json.loads = lambda *_: True\ndef solve(a, b): return 0",
    "import os\nfor n in range(64):\n try: os.write(n, b'true')\n except OSError: pass\n"
    "os._exit(0)",
    'import os\nfor n in range(64):\n try: os.write(n, b\'{"passed": true, "reward": 1}\\n\')\n'
    " except OSError: pass\nos._exit(0)",
    "import __main__\n__main__.encode = lambda value: 'true'\ndef solve(a, b): return 0",
    "import __main__\n__main__.encode = lambda value: '42 42'\ndef solve(a, b): return 0",
    "import __main__\n__main__.encode = lambda value: '[' * 200_000\ndef solve(a, b): return 0",
    "import __main__\n__main__.encode = lambda value: 'NaN'\ndef solve(a, b): return 0",
    "import __main__\n__main__.encode = lambda value: '9' * 100_000\ndef solve(a, b): return 0",
    "print(42)\ndef solve(a, b): print(42)",
    "def solve(a, b): return [42, 43, 44]",
    "def solve(a, b): return '42'",
    "def solve(a, b): yield 42",
    "x = []\nx.append(x)\ndef solve(a, b): return x",
    "solve = 42",
    "",
]


@pytest.mark.parametrize("program", FORGED)
def test_a_forged_result_is_not_the_result(program):
    verdict = grade(program, CALL)
    assert verdict.reward == 0.0, verdict.reason


def test_what_is_expected_is_nowhere_in_the_sandbox():
    """Looks through every object, file, descriptor, argument and variable it can reach."""
    search = """
import gc, os, sys
def solve(key):
    marker = 'expected' + '-'
    texts = [repr(sys.orig_argv), repr(os.environ), repr(sys.modules['__main__'].__dict__)]
    for folder, _, names in os.walk('/work'):
        texts += [open(os.path.join(folder, name), errors='replace').read() for name in names]
    for descriptor in range(64):
        try:
            os.lseek(descriptor, 0, 0)
            texts.append(os.read(descriptor, 1 << 20).decode('utf-8', 'replace'))
        except OSError:
            pass
    frame = sys._getframe()
    while frame:
        texts.append(repr(frame.f_locals.values()) if frame.f_locals is not locals() else '')
        frame = frame.f_back
    texts += [item for item in gc.get_objects() if isinstance(item, str)]
    return next((text[text.find(marker):][:16] for text in texts if marker + '7' in text), '')
"""
    verdict = grade(search, TEXT)
    assert verdict.reward == 0.0 and SECRET in verdict.reason, verdict.reason
    verdict = grade(search + "print(solve('key'))", {"tests": [{"stdout": SECRET}]})
    assert verdict.reward == 0.0 and "nothing, expected" in verdict.reason, verdict.reason


@pytest.mark.parametrize(
    "program",
    [
        *("print('true')", "print(1)", "print('{\"score\": 1}')", "print('10\\n1 10\\ntrue')"),
        "import os\nfor name in os.listdir('.'): os.remove(name)\nprint('true')",
        "import os\nprint(open('expected').read())",
        "open('expected', 'w').write('')\nopen('actual', 'w').write('2 5')\nprint('true')",
        "open('main.py', 'w').write('print(True)')\nprint('true')",
        "import sys\nsys.exit(0)",
    ],
)
def test_the_checker_is_out_of_reach(program):
    verdict = grade(program, CHECKED)
    assert verdict.reward == 0.0, verdict.reason


def test_a_checker_is_contained_too():
    """It reads what a hostile program wrote."""
    for body, refusal in (("open('/etc/passwd')", "FileNotFound"), ("import os; os.fork()", "OS")):
        with pytest.raises(ValueError, match=f"checker.*{refusal}"):
            grade("print(1)", {"tests": [{"stdout": ""}], "checker": body})
