"""The table of the shipped rewards: each has its row, and the other tables follow from the rows."""

import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path

import pytest
import r1_grading
from r1_grading.base.user_code import find_function
from r1_grading.reading import READING_REWARDS
from r1_grading.rewards import (
    GRADERS,
    RESPONSE_ONLY_REWARDS,
    REWARD_KINDS,
    SERVED_REWARDS,
    WITHOUT_TRUTH,
)
from r1_grading.truths import COMPARING_REWARDS

ROOT = Path(__file__).parents[2]
NO_KINDS = {"grade_equivalence", "refuse_environment"}
"""Functions with a reward's signature that are no kind: the equivalence alone of `math`, and what
refuses the questions of an environment."""


def shipped_rewards():
    """The rewards in the package's modules, but for the second readers."""
    rewards = set()
    for module in pkgutil.walk_packages(r1_grading.__path__, "r1_grading."):
        # The programs inside the sandbox run at import.
        if "second_readers" not in module.name and ".inside_" not in module.name:
            values = vars(importlib.import_module(module.name)).values()
            rewards |= {value for value in values if is_reward(value, module.name)}
    return rewards


def is_reward(value, module):
    """Whether a value of a module is its own public function of (response, truth, …), or a class
    with which `remote` grades."""
    if getattr(value, "__module__", "") != module:
        return False
    if inspect.isfunction(value) and not value.__name__.startswith("_"):
        parameters = [*inspect.signature(value).parameters]
        return parameters[:2] == ["response", "truth"] and value.__name__ not in NO_KINDS
    is_served = hasattr(value, "settings_type") and hasattr(value, "grade")
    return is_served and inspect.isclass(value) and not value.__subclasses__()


def test_each_shipped_reward_has_a_row_and_each_row_a_reward():
    rows = {name: find_function(kind.path) for name, kind in REWARD_KINDS.items()}
    assert set(rows.values()) == shipped_rewards()
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("name", REWARD_KINDS)
def test_a_row_says_what_its_function_reads(name):
    kind, function = REWARD_KINDS[name], find_function(REWARD_KINDS[name].path)
    assert kind.is_served == inspect.isclass(function)
    parameters = {} if kind.is_served else inspect.signature(function).parameters
    assert kind.reads_answer == ("reading" in parameters)
    if kind.reads_response_only:
        assert parameters["truth"].default is None
    if kind.truth_meaning:
        assert "'answer'" in kind.truth_meaning.format("answer")


@pytest.mark.parametrize("name", REWARD_KINDS)
def test_a_row_has_its_row_of_the_page_and_its_module_a_contract(name):
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    assert any(f"`{name}`" in line.split("|")[1] for line in page.splitlines() if line[:2] == "| ")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (
        contract
        for contract in contracts["tool"]["importlinter"]["contracts"]
        if contract["name"] == "grading is used by its public modules only"
    )
    module = REWARD_KINDS[name].path.partition(":")[0]
    assert module in contract["protected_modules"] or module == "r1_grading.remote.judge"


def test_the_other_tables_follow_from_the_rows():
    assert GRADERS == {
        "code": "r1_grading.code:grade",
        "conciseness": "r1_grading.response_rewards:grade_conciseness",
        "exact_match": "r1_grading.exact_match:grade",
        "format": "r1_grading.response_rewards:grade_format",
        "language": "r1_grading.response_rewards:grade_language",
        "logic": "r1_grading.logic:grade",
        "math": "r1_grading.math:grade",
        "repetition": "r1_grading.response_rewards:grade_repetition",
    }
    assert SERVED_REWARDS == {
        "helpful": "r1_grading.remote.reward_model:Helpful",
        "judge": "r1_grading.remote.judge:Judge",
        "safety": "r1_grading.remote.reward_model:Safety",
    }
    assert [*RESPONSE_ONLY_REWARDS] == ["conciseness", "format", "language", "repetition"]
    assert {GRADERS[name] for name in RESPONSE_ONLY_REWARDS} == {*RESPONSE_ONLY_REWARDS.values()}
    assert READING_REWARDS == ("math", "logic", "exact_match")
    assert set(COMPARING_REWARDS) == {"exact_match", "math"}
    assert set(WITHOUT_TRUTH) == {"environment", "helpful", "logic", "safety"}
    guessed = {name for name, kind in REWARD_KINDS.items() if kind.truth_meaning}
    assert guessed == {"math", "code", "exact_match"}
