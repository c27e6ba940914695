"""Tries a draft for `rl`: whether the math reward reads the truths, and `rl` takes the recipe."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1_grading import Grade, RewardPool, RewardTerms
from r1_grading.truths import accepted_answers, is_missing, math_truth

from megatron_r1 import config as configuration
from megatron_r1.commands import rl
from megatron_r1.commands.parts.cpu_memory import cpu_memory
from megatron_r1.commands.rl_prompts import check_and_read_prompts, explain_renamed_columns
from megatron_r1.data.columns import Columns
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.engines.server import gpu

TRIED_TRUTHS = 20
"""The first truths that the math reward is tried on: a choice, enough to show a column that the
reward cannot read at all."""
MODULE_SEPARATOR = ":"
"""It is in the name of a reward function of the user's own, module:function."""


def check_truths(data: str, columns: Columns) -> None:
    """Print how many of the first truths the math reward reads as an answer, and the first that it
    does not.

    Args:
        data: the data set, a path or a name.
        columns: the columns of question and truth, and the reward."""
    if columns.kind != "math" or columns.truth is None:
        return
    rows = itertools.islice(read_canonical_rows(data, {"truth": columns.truth}), TRIED_TRUTHS)
    truths = [accepted_answers(row["truth"])[0] for _, row in rows if not is_missing(row["truth"])]
    grades = asyncio.run(_grade_truths(truths))
    failures = [pair for pair in zip(truths, grades, strict=True) if pair[1].reward < 1]
    num_good = len(truths) - len(failures)
    print(f"\n{num_good} of {len(truths)} truths count as right answers to themselves")
    if failures:
        truth, grade = failures[0]
        print(
            f"  not {str(truth)[:80]!r}: {grade.reason}\n  free text takes a judge or your own "
            "function as --kind (docs/rewards.md)"
        )


def check_recipe(path: Path, columns: Columns) -> None:
    """Check the recipe as `rl` does, and print the memory that it takes without a GPU.

    Args:
        path: the recipe's file.
        columns: the columns of question and truth, and the reward.

    Raises:
        UserError: `rl` would refuse the recipe.
    """
    recipe = configuration.load_recipe(path, required=rl.REQUIRED_KEYS)
    _, prompts = check_and_read_prompts(recipe)
    if MODULE_SEPARATOR in (columns.kind or ""):
        with explain_renamed_columns(recipe.data.columns):
            asyncio.run(_check_user_reward(prompts.train))
    if not gpu.is_usable():
        memory = cpu_memory(recipe, 1, has_engines=True)
        print(memory.describe(memory.microbatch_tokens(None)))


async def _check_user_reward(prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a reward function that cannot be imported or called."""
    async with RewardPool(1) as pool:
        await RewardTerms(pool, {}).check((), prompts)


async def _grade_truths(truths: Sequence[Any]) -> list[Grade]:
    async with RewardPool(1) as pool:
        finals = [math_truth(truth) for truth in truths]
        pairs = zip(finals, truths, strict=True)
        calls = [pool.grade("math", f"<answer>{final}</answer>", truth) for final, truth in pairs]
        return await asyncio.gather(*calls)
