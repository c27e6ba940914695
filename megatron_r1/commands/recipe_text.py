"""A commented recipe, as text."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from megatron_r1.commands.recipe_sizes import Guess
from megatron_r1.config.yaml_text import as_text

WIDTH = 100
SECTIONS = (
    *("run", "model", "data", "sft", "reward_model", "rollout", "rewards", "rl", "optimizer"),
    *("parallel", "push", "checkpoint", "eval"),
)


def recipe_text(title: Sequence[str], guesses: Sequence[Guess]) -> str:
    """Return a recipe that sets each key, its reason in a comment above. title: the first lines."""
    lines = [f"# {line}" for line in title]
    by_section: dict[str, list[Guess]] = {name: [] for name in SECTIONS}
    for guess in guesses:
        by_section[guess.key.partition(".")[0]].append(guess)
    for section, own in by_section.items():
        if own:
            lines.append(f"{section}:")
        for guess in own:
            lines += textwrap.wrap(
                guess.reason, WIDTH, initial_indent="  # ", subsequent_indent="  # "
            )
            lines.append(f"  {guess.key.partition('.')[2]}: {value_text(guess.value)}")
    return "\n".join(lines) + "\n"


def value_text(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return as_text(value)
