"""The code reward on honest answers: what is accepted, what is not, and why."""

import builtins
import importlib
import json

import pytest
from code_answers import NAP, QUICK, attack, fenced, needs_compiler, needs_sandbox
from code_problems import PROBLEMS

from megatron_r1.rewards import code
from megatron_r1.rewards.code import find_program
from megatron_r1.rewards.code.compare import equal_output, equal_result
from megatron_r1.rewards.code.problem import parse_problem
from megatron_r1.rewards.sandbox.names import MODULES, exported

CASES = [
    pytest.param(name, language, marks=needs_compiler if language == "cpp" else ())
    for name, problem in PROBLEMS.items()
    for language in problem["right"]
]


@needs_sandbox
@pytest.mark.parametrize(("name", "language"), CASES)
def test_right_programs_pass_every_test(name, language):
    problem = PROBLEMS[name]
    response = fenced(problem["right"][language], language)
    num_tests = len(problem["truth"]["tests"])
    for truth in (problem["truth"], json.dumps(problem["truth"])):
        verdict = code.grade(response, truth, language=language)
        assert verdict.reward == 1.0, verdict.reason
        assert verdict.reason == f"passed {num_tests} of {num_tests} tests"


@needs_sandbox
@pytest.mark.parametrize(("name", "language"), CASES)
def test_wrong_programs_fail_where_they_are_wrong(name, language):
    problem = PROBLEMS[name]
    response = fenced(problem["wrong"][language], language)
    num_tests, failing = len(problem["truth"]["tests"]), problem["failing"]
    verdict = code.grade(response, problem["truth"], language=language)
    assert verdict.reward == 0.0
    assert verdict.reason.startswith(f"test {failing[0]} of {num_tests}: "), verdict.reason
    partial = code.grade(response, problem["truth"], language=language, partial=True)
    assert partial.reward == pytest.approx(1 - len(failing) / num_tests), partial.reason


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(1 / 0)", "ZeroDivisionError: division by zero"),
        ("print(42", "SyntaxError: '(' was never closed"),
        ("import numpy", "No module named 'numpy'"),
        ("print(43)", "wrong answer: 43, expected 42"),
        ("pass", "wrong answer: nothing, expected 42"),
        ("print(4, 2)", "wrong answer: 4 2, expected 42"),
        ("raise SystemExit(3)", "runtime error (exit status 3)"),
        ("print(42)\nraise SystemExit(1)", "runtime error (exit status 1)"),
        ("input()", "EOFError"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_reasons_say_what_went_wrong(program, reason):
    verdict = attack(program)
    assert verdict.reward == 0.0 and reason in verdict.reason, verdict.reason


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "print(42, end='')",
        "print('  42  ')\nprint()\nprint()",
        "import os\nos.write(1, b'42\\r\\n')",
        "print(42)\nexit()\nprint(43)",
        "print(42)\nquit(0)",
        "from __future__ import annotations\nimport sys\nassert __name__ == '__main__'\nprint(42)",
        "import sys\nassert len(sys.argv) == 1 and sys.argv[0] == 'main.py'\nprint(42)",
        "import sys\nsys.stderr.write('debugging')\nprint(42)",
        "import sys\nsys.setrecursionlimit(10 ** 6)\nf = lambda n: n and f(n - 1)\nf(10 ** 5)\n"
        "print(42)",
        "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 27)\n"
        "t = threading.Thread(target=lambda: print(42))\nt.start()\nt.join()",
        "import os\nn = os.fstat(0).st_size\nassert os.read(0, n + 1) == b''\nprint(42)",
        "print(42, file=open('/dev/null', 'w'))\nprint(open('main.py').read()[-3:-1])  # 42",
        "import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools\n"
        "import hashlib, heapq, itertools, json, math, random, re, statistics, string, typing\n"
        "print(42)",
    ],
)
def test_what_honest_programs_do_is_possible(program):
    verdict = attack(program)
    assert verdict.reward == 1.0, verdict.reason


@needs_sandbox
def test_limits_are_per_prompt_and_time_is_shared_by_all_tests():
    slow = "import time\ntime.sleep(0.7)\nprint(42)"
    assert attack(slow).reward == 1.0
    assert "stopped after 0.2 s" in attack(slow, limits={"wall_seconds": 0.2}).reason
    assert "memory limit of 64 MiB" in attack("x = 'x' * 10 ** 8", limits={"memory_mib": 64}).reason
    many = {"tests": [{"stdout": "42"}] * 50}
    verdict = code.grade(fenced(slow), many, partial=True, limits={**NAP, "total_seconds": 1.5})
    assert 0 < verdict.reward < 0.1 and "passed" in verdict.reason, verdict.reason


@needs_sandbox
def test_long_numbers_can_be_printed_and_read():
    program = "print(int('7' * 5_000) + 0)"
    assert code.grade(fenced(program), {"tests": [{"stdout": "7" * 5_000}]}).reward == 1.0


def test_an_expected_output_that_no_program_may_print_is_an_error():
    truth = {"tests": [{"stdout": "1"}, {"stdout": "1" * 2**20}]}
    with pytest.raises(ValueError, match=r"test 2 expects 1.0 MiB.*limits.output_mib: 0.5"):
        code.grade(fenced("print(1)"), truth, limits={"output_mib": 0.5})


def test_a_result_that_no_function_may_return_is_an_error():
    truth = {"function": "f", "tests": [{"args": [], "result": ["1" * 2**20]}]}
    with pytest.raises(ValueError, match=r"test 1 expects 1.0 MiB.*limits.output_mib: 0.5"):
        code.grade(fenced("def f(): return 1"), truth, limits={"output_mib": 0.5})


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reward"),
    [("def f(n): return 10 ** n", 1), ("def f(n): return 10 ** n + 1", 0)],
)
def test_results_of_more_than_4_300_digits_are_compared(program, reward):
    truth = {"function": "f", "tests": [{"input": "6000", "output": "1" + "0" * 6_000}]}
    grade = code.grade(fenced(program), truth)
    assert grade.reward == reward, grade.reason
    assert reward or "expected a int with more than 4,300 digits" in grade.reason


USUAL = """from __future__ import annotations
def f(pairs: List[int]) -> Optional[int]:
    return gcd(*pairs)
print("\\n", f([4, 6]), deepcopy([1.0])[0], heapq.nlargest(1, [1, 2])[0], mean([1, 2]))
print(pow(2, 10, 1000), timedelta(days=1).days, datetime.datetime(2020, 1, 1).year, stdin.read())"""


def test_an_argument_ends_at_a_newline_only():
    given = ["a\u2028b", "c\u0085d"]
    text = "\r\n".join(json.dumps(part, ensure_ascii=False) for part in given)
    truth = {"function": "f", "tests": [{"input": text, "output": "1"}]}
    assert list(parse_problem(truth, "python").tests[0].args) == given


@needs_sandbox
def test_livecodebench_tests_are_judged_as_by_its_harness():
    tests = [{"input": "7", "output": "2 1 2 1.50\n24 1 2020 7", "testtype": "stdin"}]
    grade = code.grade(fenced(USUAL), {"tests": tests})
    assert grade.reward == 1, grade.reason
    assert code.grade(fenced("print(gcd(7, 0), 'No')"), {"tests": tests}).reward == 0
    tests = [{"stdin": "7", "stdout": "2 1.0 2 1.5\n24 1 2020 7"}]
    assert "'gcd' is not defined" in code.grade(fenced("print(gcd(7, 0))"), {"tests": tests}).reason
    own = "def gcd(a, b): return 5\nprint(gcd(4, 6))"
    assert code.grade(fenced(own), {"tests": [{"input": "", "output": "5"}]}).reward == 1


def test_the_harness_s_names_are_those_of_its_imports():
    namespace = {}
    for module in MODULES:
        exec(f"from {module} import *", namespace)
    exec("from builtins import *", namespace)
    for module in MODULES:
        exec(f"import {module}", namespace)
    for name, module in exported().items():
        provider = importlib.import_module(module)
        assert namespace[name] is (provider if name == module else getattr(provider, name)), name
    missing = {name for name in namespace if not name.startswith("_")} - exported().keys()
    assert all(hasattr(builtins, name) for name in missing)


@needs_sandbox
def test_a_checker_may_give_a_part_and_must_say_something_that_is_a_verdict():
    truth = {"tests": [{"stdin": ""}] * 2, "checker": "print(0.5)"}
    assert code.grade(fenced("pass"), truth).reward == 0.0
    assert code.grade(fenced("pass"), truth, partial=True).reward == 0.5
    truth["checker"] = "import sys\nprint('no', open(sys.argv[3]).read())\nsys.exit(1)"
    assert "checker rejects: no thanks" in code.grade(fenced("print('thanks')"), truth).reason
    truth["checker"] = "print('looks fine')"
    with pytest.raises(ValueError, match="checker is broken.* last line must .* got 'looks fine'"):
        code.grade(fenced("pass"), truth)


@needs_sandbox
def test_the_same_program_gets_the_same_reward():
    program = "print(*{'spring', 'summer', 'autumn', 'winter', 'dawn', 'noon', 'dusk', 'night'})"
    truth = {"tests": [{"stdout": "?"}]}
    assert len({code.grade(fenced(program), truth).reason for _ in range(4)}) == 1


FENCE = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (FENCE, "print(1)\n"),
        (f"So:\n\n{FENCE}\n\nThat is all.", "print(1)\n"),
        (f"```\nprint(0)\n```\n{FENCE}", "print(1)\n"),
        (f"<think>```\nprint(0)\n```</think>{FENCE}", "print(1)\n"),
        (f"<think>x</think><answer>{FENCE}</answer>", "print(1)\n"),
        (f"<think>x</think><answer>\n{FENCE}\n</answer>\n```\nprint(2)\n```", "print(1)\n"),
        ("~~~\nprint(1)\n~~~", "print(1)\n"),
        ("````\nprint('''\n```\n''')\n````", "print('''\n```\n''')\n"),
        ("1. So:\n   ```py\n   if x:\n     y\n   ```", "if x:\n  y\n"),
        ("```\r\nprint(1)\r\n```\r\n", "print(1)\r\n"),
        ("```inline``` and\n" + FENCE, "print(1)\n"),
        (f"{FENCE}<|im_end|>", "print(1)\n"),
        (f"{FENCE}<｜end▁of▁sentence｜>\n<|im_end|>\n", "print(1)\n"),
        (f"<think>x</think><answer>{FENCE}</answer><|im_end|>", "print(1)\n"),
        (f"{FENCE}so", None),
        ("", None),
        ("print(1)", None),
        ("```\n\n```", None),
        ("```python\nprint(1)", None),
        (f"{FENCE}\n```python\nprint(2)", None),
        (f"<think>{FENCE}</think>done", None),
        (f"<think>{FENCE}", None),
        (f"<answer>1</answer>{FENCE}", None),
        (f"<answer>{FENCE}</answer><answer>{FENCE}</answer>", None),
        (f"<answer>{FENCE}", None),
    ],
)
def test_the_program_is_the_last_fenced_block_of_the_answer(response, program):
    assert find_program(response).text == program


def test_a_thought_opened_by_the_prompt_must_be_closed():
    assert find_program(FENCE, opened=True).text is None
    assert find_program(f"so</think>{FENCE}", opened=True).text == "print(1)\n"


def test_answers_and_programs_of_megabytes_are_refused():
    for answer in ("```\n" * 2_500_000, "`" * 10_000_000):
        assert find_program(answer).reason == "the answer is too long: 10000000 characters"
    assert "program is too long" in find_program(f"```\n{'x' * 300_000}\n```").reason


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "equal"),
    [
        ("1 2\n3\n", "1 2\n3", None, True),
        ("1  2 \n 3\n\n\n", "1 2\n3\n", None, True),
        ("1\t2\r\n3\r\n", "1 2\n3\n", None, True),
        ("", "", None, True),
        ("\n \n", "", None, True),
        ("1 2 3", "1 2\n3", None, False),
        ("1\n\n2", "1\n2", None, False),
        ("\n\n1", "1", None, True),
        ("1", "1 1", None, False),
        ("1 1", "1", None, False),
        ("YES", "Yes", None, False),
        ("1.0", "1", None, False),
        ("01", "1", None, False),
        ("１", "1", None, False),
        ("1\x00", "1", None, False),
        ("1.0", "1", 0, True),
        ("0.3333", "0.33334", 1e-4, True),
        ("0.3333", "0.33334", 1e-5, False),
        ("1000001", "1000000", 1e-6, True),
        ("yes 0.5", "yes .5", 0, True),
        ("yes", "no", 0.5, False),
        *((text, "1", 0.9, False) for text in ("nan", "inf", "0x1", "1_0", "1e999", "١")),
        ("1e308", "-1e308", 0.9, False),
        ("9007199254740993", "9007199254740992", 0, False),
        ("1e999", "1e999", 0, True),
        ("10e998", "1e999", 0, True),
        ("9" * 10**6, "1", 0.9, False),
        ("1" + "0" * 999 + ".0", "1" + "0" * 999, 0, True),
        ("1" + "0" * 998 + "1", "1" + "0" * 999, 0, False),
    ],
)
def test_outputs_are_compared_line_by_line_and_token_by_token(actual, expected, tolerance, equal):
    assert equal_output(actual.encode(), expected, tolerance) is equal


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "equal"),
    [
        ("42", 42, None, True),
        ("42.0", 42, None, True),
        ("[1, [2, null]]", [1, [2, None]], None, True),
        ('{"a": 1, "b": [2]}', {"b": [2], "a": 1}, None, True),
        ("[1, 2]", [2, 1], None, False),
        ("[1]", [1, 2], None, False),
        ('"42"', 42, None, False),
        ("42", "42", None, False),
        ("null", 0, None, False),
        ("[]", {}, None, False),
        ("", None, None, False),
        ("42 42", 42, None, False),
        ("NaN", 1.0, 0.9, False),
        ("Infinity", 1.0, 0.9, False),
        ("0.30000000000000004", 0.3, None, False),
        ("[0.30000000000000004]", [0.3], 1e-9, True),
        ("[" * 10**6, [], None, False),
        ("9" * 10**6, 1, None, False),
        ("1e999", 1, 0.9, False),
        ("9007199254740993", 9007199254740992, 0, False),
        ("9007199254740993.0", 9007199254740992, 0, True),
        ("9007199254740992.0", 9007199254740993, 0, False),
        pytest.param("9" * 5_000, 10**5_000 - 1, None, True, id="5,000 digits"),
        pytest.param("9" * 5_000, 10**5_000 - 2, None, False, id="5,000 digits, another"),
    ],
)
def test_results_are_compared_as_values(actual, expected, tolerance, equal):
    assert equal_result(actual.encode(), expected, tolerance) is equal


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (None, "must be"),
        ("5", "must be"),
        ("{", "not JSON"),
        ({}, "at least one test"),
        ({"tests": []}, "at least one test"),
        ({"tests": ["x"]}, "test 1 must be an object"),
        ({"tests": [{"stdin": "1", "stdout": "1"}, {"stdin": "1"}]}, "test 2: stdout must be text"),
        ({"tests": [{"stdin": 1, "stdout": "1"}]}, "test 1: stdin must be text, got 1"),
        ({"tests": [{"stdout": "1"}, {"stdim": "1", "stdout": "1"}]},
         r"test 2 has 'stdim'; did you mean 'stdin'[?] .known: stdin, stdout, input, output"),
        ({"tests": [{"weight": 1, "stdout": "1"}]}, r"test 1 has 'weight' .known: stdin"),
        ({"tests": [{"args": [], "results": 1}], "function": "f"}, "did you mean 'result'"),
        ({"tests": [{"stdout": ""}], "tolerence": 1}, "has 'tolerence'; did you mean 'tolerance'"),
        ({"tests": [{"stdout": ""}], "tolerance": "1"}, "tolerance must be a number"),
        ({"tests": [{"stdout": ""}], "tolerance": 1e6}, "below 1"),
        ({"tests": [{"stdout": ""}], "checker": ""}, "checker must be text"),
        ({"tests": [{}], "checker": "x", "tolerance": 0.1}, "leave out the tolerance"),
        ({"tests": [{"args": [1]}], "function": "f"}, "needs 'args' and 'result'"),
        ({"tests": [{"args": 1, "result": 1}], "function": "f"}, "args must be a list"),
        ({"tests": [{"input": "[1", "output": "1"}], "function": "f"}, "an argument is not JSON"),
    ],
)  # fmt: skip
def test_a_truth_that_is_none_is_an_error_that_names_the_test(truth, message):
    with pytest.raises(ValueError, match=message):
        parse_problem(truth, "python")


def test_languages_limits_and_standards_are_checked():
    call = {"function": "f", "tests": [{"args": [], "result": 1}]}
    with pytest.raises(ValueError, match="function-call tests are for python"):
        parse_problem(call, "cpp")
    with pytest.raises(ValueError, match="language must be one of python, cpp, got 'rust'"):
        parse_problem(call, "rust")
    for limits, message in {
        "cpu_second": "unknown; known: cpu_seconds",
        "memory_mib": "above 0 and at most 16384",
    }.items():
        with pytest.raises(ValueError, match=message):
            code.grade("", call, limits={limits: 10**9})
    with pytest.raises(ValueError, match="standard must be one of"):
        code.grade("", call, standard="c++11", limits=QUICK)
