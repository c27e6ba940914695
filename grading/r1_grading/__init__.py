"""Grading of language models' answers: mathematics, programs, logic, form; in workers that may die.

The five names of this file are the face of the package:

- `grade(kind, response, truth, **fields)` grades one answer in this process.
- `Grade` is the result: a number from 0 to 1, and the reason for it.
- `read_answer(response, reading)` finds the final answer of a response.
- `RewardPool` grades in processes that may hang, crash or run out of memory.
- `RewardTerms` calls the terms of a recipe and `terms.combine` adds them up.

Programs that build on it may also import from `base`, `pool`, `reading`, `remote`, `rewards`,
`sandbox`, `terms` and `truths`; all other modules are private. README.md lists both.

A name is imported when it is used: `Grade` imports the standard library only, `RewardPool` aiohttp.
"""

from typing import TYPE_CHECKING, Any

from r1_grading.base import import_lazily

if TYPE_CHECKING:
    from r1_grading.pool import RewardPool
    from r1_grading.reading import read_answer
    from r1_grading.reward_signatures import grade
    from r1_grading.rewards import Grade
    from r1_grading.terms import RewardTerms

__all__ = ["Grade", "RewardPool", "RewardTerms", "grade", "read_answer"]

_MODULES = {
    "Grade": "rewards",
    "RewardPool": "pool",
    "RewardTerms": "terms",
    "grade": "reward_signatures",
    "read_answer": "reading",
}


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)
