"""The five names of the package, what they import, and what becomes of its former name."""

import subprocess
import sys

import pytest
import r1_grading
from r1_grading import Grade, grade, read_answer
from r1_grading.base.errors import Cause
from r1_grading.base.user_code import find_function
from r1_grading.rewards import resolve_reward
from refusals import refused

HEAVY = ("aiohttp", "asyncio", "numpy", "pydantic", "sympy", "torch")


def test_a_module_of_a_users_own_imports_the_standard_library_only():
    program = (
        f"import sys\nfrom r1_grading import Grade\nprint([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_there_are_five_names_and_no_other():
    assert len(r1_grading.__all__) == 5
    assert all(callable(getattr(r1_grading, name)) for name in r1_grading.__all__)
    with pytest.raises(AttributeError, match="RewardPol"):
        r1_grading.RewardPol  # noqa: B018


def test_one_answer_is_graded_with_the_fields_of_its_row(tmp_path, monkeypatch):
    assert grade("math", r"so \boxed{0.5}", "1/2") == Grade(1.0, "correct: 0.5")
    row = {"kind": "language", "truth": None, "target": "en"}
    assert grade("language", "<think>我们想</think>", **row).reward == 0
    assert read_answer("The sum is 13.", "auto", numeric=True).text == "13"
    (tmp_path / "mine_of_verl.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return 7.0 if solution_str == ground_truth else -1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert grade("mine_of_verl:score", "13", "13").reward == 7.0
    with refused("kind", Cause.UNSUPPORTED, "judge"):
        grade("judge", "13", "13")


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        ("megatron_r1.rewards.math:grade", "'math'"),
        ("megatron_r1.rewards.format:grade", "'format'"),
        ("megatron_r1.rewards:refuse_environment", "r1_grading"),
    ],
)
def test_a_former_name_in_a_recipe_is_refused_with_the_new_one(kind, new):
    with refused("kind", Cause.UNKNOWN, new):
        resolve_reward(kind)


def test_a_former_name_in_a_module_of_a_users_own_is_refused_with_the_new_one(
    tmp_path, monkeypatch
):
    (tmp_path / "mine_of_before.py").write_text(
        "raise ModuleNotFoundError(name='megatron_r1.rewards')  # as its import does\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with refused("mine_of_before:steps", Cause.NOT_FOUND, "from r1_grading import Grade"):
        find_function("mine_of_before:steps")
