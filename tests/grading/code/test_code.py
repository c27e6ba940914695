"""The code reward on honest answers: what is accepted, what is not, and why."""

import builtins
import importlib
import json
from pathlib import Path

import pytest
import yaml
from code_answers import PATIENT, attack, fenced, needs_compiler, needs_sandbox
from r1_grading import code
from r1_grading.code.problem import parse_problem
from r1_grading.code.program_text import find_program
from r1_grading.sandbox.programs import PRELOADED_MODULES, standard_names

from megatron_r1.base.files.json_lines import read_lines

HERE = Path(__file__).parent
PROBLEMS = yaml.safe_load((HERE / "problems.yaml").read_text("utf-8"))
FENCES = list(read_lines(HERE / "fences.jsonl"))
CASES = [
    pytest.param(name, language, marks=needs_compiler if language == "cpp" else ())
    for name, problem in PROBLEMS.items()
    for language in problem["right"]
]


def graded(program, truth, **fields):
    return code.grade(fenced(program), truth, limits=PATIENT, **fields)


def judge(name, kind, language, **fields):
    problem = PROBLEMS[name]
    response = fenced(problem[kind][language], language)
    truth = problem["truth"] if language == "python" else json.dumps(problem["truth"])
    return code.grade(response, truth, language=language, limits=PATIENT, **fields)


@pytest.mark.first_cases(2)
@needs_sandbox
@pytest.mark.parametrize(("name", "language"), CASES)
def test_right_programs_pass_every_test(name, language):
    verdict = judge(name, "right", language)
    assert verdict.reward == 1.0, verdict.reason
    assert str(len(PROBLEMS[name]["truth"]["tests"])) in verdict.reason


@pytest.mark.first_cases(2)
@needs_sandbox
@pytest.mark.parametrize(("name", "language"), CASES)
def test_wrong_programs_fail_where_they_are_wrong(name, language):
    num_tests, failing = len(PROBLEMS[name]["truth"]["tests"]), PROBLEMS[name]["failing"]
    partial = judge(name, "wrong", language, partial=True)
    assert partial.reward == pytest.approx(1 - len(failing) / num_tests), partial.reason
    if language == "python":
        verdict = judge(name, "wrong", language)
        assert verdict.reward == 0.0
        assert f"test {failing[0]} of {num_tests}" in verdict.reason, verdict.reason


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(1 / 0)", "ZeroDivisionError: division by zero"),
        ("print(42", "SyntaxError: '(' was never closed"),
        ("import numpy", "No module named 'numpy'"),
        ("print(43)", "43, expected 42"),
        ("pass", "nothing, expected 42"),
        ("print(4, 2)", "4 2, expected 42"),
        ("raise SystemExit(3)", "exit status 3"),
        ("print(42)\nraise SystemExit(1)", "exit status 1"),
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
def test_limits_are_per_prompt():
    slow = "import time\ntime.sleep(0.7)\nprint(42)"
    assert attack(slow).reward == 1.0
    assert "0.2 s" in attack(slow, limits={"wall_seconds": 0.2}).reason
    assert "64 MiB" in attack("x = 'x' * 10 ** 8", limits={"memory_mib": 64}).reason


@needs_sandbox
@pytest.mark.more  # it waits for the end of the time
def test_the_time_of_all_tests_ends_them():
    """The first of 50 tests is passed at once; the others wait for what never comes."""
    waiting = "import time\nif input() != '0': time.sleep(1000)\nprint(42)"
    many = {"tests": [{"stdin": f"{n}\n", "stdout": "42"} for n in range(50)]}
    limits = PATIENT | {"total_seconds": 60}
    verdict = code.grade(fenced(waiting), many, partial=True, limits=limits)
    assert verdict.reward == pytest.approx(1 / 50), verdict.reason


@needs_sandbox
def test_long_numbers_can_be_printed_and_read():
    program = "print(int('7' * 5_000) + 0)"
    truth = {"tests": [{"stdout": "7" * 5_000}]}
    assert code.grade(fenced(program), truth, limits=PATIENT).reward == 1.0


@pytest.mark.parametrize(
    ("truth", "test"),
    [
        ({"tests": [{"stdout": "1"}, {"stdout": "1" * 2**20}]}, "test 2"),
        ({"function": "f", "tests": [{"args": [], "result": ["1" * 2**20]}]}, "test 1"),
    ],
    ids=["output", "result"],
)
def test_an_output_or_result_that_no_program_may_give_is_an_error(truth, test):
    with pytest.raises(ValueError, match=rf"{test} .*1.0 MiB.*limits.output_mib: 0.5"):
        code.grade(fenced("def f(): return 1"), truth, limits={"output_mib": 0.5})


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reward"),
    [("def f(n): return 10 ** n", 1), ("def f(n): return 10 ** n + 1", 0)],
)
def test_results_of_more_than_4_300_digits_are_compared(program, reward):
    truth = {"function": "f", "tests": [{"input": "6000", "output": "1" + "0" * 6_000}]}
    grade = code.grade(fenced(program), truth, limits=PATIENT)
    assert grade.reward == reward, grade.reason
    assert reward or "4,300" in grade.reason


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
    grade = graded(USUAL, {"tests": tests})
    assert grade.reward == 1, grade.reason
    assert graded("print(gcd(7, 0), 'No')", {"tests": tests}).reward == 0
    tests = [{"stdin": "7", "stdout": "2 1.0 2 1.5\n24 1 2020 7"}]
    assert "'gcd' is not defined" in graded("print(gcd(7, 0))", {"tests": tests}).reason
    own = "def gcd(a, b): return 5\nprint(gcd(4, 6))"
    assert graded(own, {"tests": [{"input": "", "output": "5"}]}).reward == 1


def test_the_harness_s_names_are_those_of_its_imports():
    namespace = {}
    for module in PRELOADED_MODULES:
        exec(f"from {module} import *", namespace)
    exec("from builtins import *", namespace)
    for module in PRELOADED_MODULES:
        exec(f"import {module}", namespace)
    for name, module in standard_names().items():
        provider = importlib.import_module(module)
        assert namespace[name] is (provider if name == module else getattr(provider, name)), name
    missing = {name for name in namespace if not name.startswith("_")} - standard_names().keys()
    assert all(hasattr(builtins, name) for name in missing)


@needs_sandbox
def test_a_checker_may_give_a_part_and_must_say_something_that_is_a_verdict():
    truth = {"tests": [{"stdin": ""}] * 2, "checker": "print(0.5)"}
    assert graded("pass", truth).reward == 0.0
    assert graded("pass", truth, partial=True).reward == 0.5
    truth["checker"] = "import sys\nprint('no', open(sys.argv[3]).read())\nsys.exit(1)"
    assert "no thanks" in graded("print('thanks')", truth).reason
    truth["checker"] = "print('looks fine')"
    with pytest.raises(ValueError, match="'looks fine'"):
        graded("pass", truth)


@needs_sandbox
def test_the_same_program_gets_the_same_reward():
    program = "print(*{'spring', 'summer', 'autumn', 'winter', 'dawn', 'noon', 'dusk', 'night'})"
    truth = {"tests": [{"stdout": "?"}]}
    assert len({graded(program, truth).reason for _ in range(4)}) == 1


FENCE = "```python\nprint(1)\n```"


@pytest.mark.parametrize("case", FENCES, ids=lambda case: case["response"][:40])
def test_the_program_is_the_last_fenced_block_of_the_answer(case):
    assert find_program(case["response"]).text == case["program"]


def test_a_thought_opened_by_the_prompt_must_be_closed():
    assert find_program(FENCE, thought_opened=True).text is None
    assert find_program(f"so</think>{FENCE}", thought_opened=True).text == "print(1)\n"


def test_answers_and_programs_of_megabytes_are_refused():
    for answer in ("```\n" * 2_500_000, "`" * 10_000_000):
        assert "10000000" in find_program(answer).reason
    refused = find_program(f"```\n{'x' * 300_000}\n```")
    assert refused.text is None and refused.reason


@pytest.mark.parametrize(
    ("truth", "named"),
    [
        (None, "NoneType"),
        ("5", "int"),
        ("{", "'{'"),
        ({}, "None"),
        ({"tests": []}, r"\[\]"),
        ({"tests": ["x"]}, "test 1.*str"),
        ({"tests": [{"stdin": "1", "stdout": "1"}, {"stdin": "1"}]}, "test 2.*stdout"),
        ({"tests": [{"stdin": 1, "stdout": "1"}]}, "test 1.*stdin.*1"),
        ({"tests": [{"stdout": "1"}, {"stdim": "1", "stdout": "1"}]}, "test 2.*'stdim'.*'stdin'"),
        ({"tests": [{"weight": 1, "stdout": "1"}]}, "test 1.*'weight'.*stdin"),
        ({"tests": [{"args": [], "results": 1}], "function": "f"}, "'results'.*'result'"),
        ({"tests": [{"stdout": ""}], "tolerence": 1}, "'tolerence'.*'tolerance'"),
        ({"tests": [{"stdout": ""}], "tolerance": "1"}, "tolerance.*'1'"),
        ({"tests": [{"stdout": ""}], "tolerance": 1e6}, "tolerance.*1000000"),
        ({"tests": [{"stdout": ""}], "checker": ""}, "checker.*''"),
        ({"tests": [{}], "checker": "x", "tolerance": 0.1}, "checker.*tolerance"),
        ({"tests": [{"args": [1]}], "function": "f"}, "'args'.*'result'"),
        ({"tests": [{"args": 1, "result": 1}], "function": "f"}, "args.*kwargs"),
        ({"tests": [{"input": "[1", "output": "1"}], "function": "f"}, r"'\[1'"),
    ],
)  # fmt: skip
def test_a_truth_that_is_none_is_an_error_that_names_the_test(truth, named):
    with pytest.raises(ValueError, match=named):
        parse_problem(truth, "python")


def test_languages_limits_and_standards_are_checked():
    call = {"function": "f", "tests": [{"args": [], "result": 1}]}
    with pytest.raises(ValueError, match="python"):
        parse_problem(call, "cpp")
    with pytest.raises(ValueError, match="python.*cpp.*'rust'"):
        parse_problem(call, "rust")
    for limit, named in {"cpu_second": "cpu_second.*cpu_seconds", "memory_mib": "16384"}.items():
        with pytest.raises(ValueError, match=f"limits.*{named}"):
            code.grade("", call, limits={limit: 10**9})
    with pytest.raises(ValueError, match=r"'c\+\+11'"):
        code.grade("", call, standard="c++11", limits=PATIENT)
