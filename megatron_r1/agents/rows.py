"""The questions of an environment: rows for its `reset`."""

from dataclasses import replace
from typing import Any

from megatron_r1.agents.environment_pool import describe
from megatron_r1.data.prompts import PromptSplit, load_prompts
from megatron_r1.rewards import ENVIRONMENT


def load_rows(environment: str, **arguments: Any) -> PromptSplit:
    """Return `data.prompts.load_prompts` for `agents.environment`, or for none: where the
    environment grades, rows need no truth. Raises UserError."""
    if not environment or not describe(environment).grades:
        return load_prompts(**arguments)
    split = load_prompts(**arguments | {"kind": ENVIRONMENT})
    train, heldout = (
        [replace(prompt, kind=ENVIRONMENT) for prompt in side]
        for side in (split.train, split.heldout)
    )
    return PromptSplit(train, heldout)
