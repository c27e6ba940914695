"""Whose fault it is that a special checker fails: its own, or the answer's that it looks at."""

import pytest
from code_answers import PATIENT, SPIN, fenced, needs_sandbox
from r1_grading import Grade, code

pytestmark = needs_sandbox
CORRECT, INCORRECT = "print(4)", "print(5)"
READ = "import sys\n_, e, a = (open(path).read() for path in sys.argv[1:])\n"
COUNTING_DOWN = READ + "n = int(a)\nwhile n != 4: n -= 1"
GOOD = READ + "sys.exit(0 if int(a) == int(e) else 1)"


def grade(program: str, checker: str, expected: str = "4", **limits: float) -> Grade:
    truth = {"tests": [{"stdin": "", "stdout": expected}], "checker": checker}
    patience = SPIN if "while" in checker else PATIENT
    return code.grade(fenced(program), truth, limits={**patience, **limits})


@pytest.mark.parametrize(
    ("checker", "reason", "programs"),
    [
        ("if True print(1)", "SyntaxError", [CORRECT, INCORRECT]),
        ("import numpy", "ModuleNotFoundError", [CORRECT]),
        ("x = 'x' * 10 ** 10", "MemoryError", [CORRECT]),
        ("while True: pass", "time limit", [INCORRECT]),
        (READ + "print(soted(a))", "NameError: name 'soted'", [CORRECT, INCORRECT]),
        (READ + "sys.exit(3)", "exit status 3", [CORRECT]),
        (READ + "print('fine')", "'fine'", [CORRECT]),
    ],
)
def test_a_broken_checker_is_named_and_judges_no_answer(checker, reason, programs):
    for program in programs:
        with pytest.raises(ValueError, match=reason):
            grade(program, checker)


@pytest.mark.parametrize(
    ("program", "checker", "reason"),
    [
        ("print('four')", GOOD, "ValueError: invalid literal"),
        ("pass", READ + "print(int(a.split()[0] == e))", "IndexError"),
        ("print('no verdict')", READ + "print(a if a.strip() != '4' else 1)", "no verdict"),
        pytest.param(*("print(-1)", COUNTING_DOWN, "time limit"), marks=pytest.mark.more),
        ("print(10 ** 10)", READ + "'x' * int(a)", "memory"),
        ("print(200_000)", READ + "f = lambda n: n and f(n - 1)\nf(int(a))", ""),
        ("print(5)", READ + "assert a.strip() == '4'", "AssertionError"),
        # What the checker repeats of an answer says nothing of the checker.
        ("print(r'\\0actual')", READ + "sys.stderr.write(a)\nint(a)", "ValueError"),
    ],
)
def test_an_answer_that_makes_the_checker_fail_is_wrong_and_not_ungraded(program, checker, reason):
    verdict = grade(program, checker)
    assert verdict.reward == 0.0, verdict.reason
    assert "checker" in verdict.reason and reason in verdict.reason
    assert grade(CORRECT, checker).reward == 1.0


def test_without_an_expected_output_a_checker_that_has_looked_is_believed():
    """Nothing shows then that it would not fail on every output; 0 is what no answer wants."""
    verdict = grade("print('four')", READ + "sys.exit(int(a) % 2)", expected="")
    assert verdict.reward == 0.0 and "ValueError" in verdict.reason, verdict.reason


def test_a_program_that_uses_up_all_time_cannot_blame_the_checker():
    slow = "import time\ntime.sleep(0.8)\n" + GOOD
    verdict = grade("import time\ntime.sleep(0.8)\nprint(5)", slow, total_seconds=1.2)
    assert verdict.reward == 0.0, verdict.reason


def test_a_checker_rejects_by_any_exit_status_of_its_own():
    for status in ("1", "2", "7", "'not four'"):
        checker = READ + f"sys.exit({status} if a.strip() != '4' else 0)"
        verdict = grade(INCORRECT, checker)
        assert verdict.reward == 0.0 and "rejects" in verdict.reason, verdict.reason
        assert grade(CORRECT, checker).reward == 1.0
