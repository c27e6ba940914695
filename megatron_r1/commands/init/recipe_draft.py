"""A draft of a recipe: settings with the reason of each, and their text, in which the reasons are
comments."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.commands.parts.guessed_settings import Guess, yaml_value_text
from megatron_r1.commands.parts.node_resources import NodeResources
from megatron_r1.models.hf_config import HFConfig

LINE_WIDTH = 100
SECTION_ORDER = (
    "run",
    "model",
    "data",
    "sft",
    "reward_model",
    "rollout",
    "rewards",
    "rl",
    "optimizer",
    "parallel",
    "push",
    "checkpoint",
    "eval",
)


@dataclass(frozen=True)
class QuestionSource:
    """A model's folder and the first rows of a data file.

    Attributes:
        folder: the model's folder.
        hf_config: the model's `config.json`.
        parameters: the number of the model's parameters.
        data: the file or data set, as it was given.
        rows: its first rows.
        node: the node of the run."""

    folder: Path
    hf_config: HFConfig
    parameters: int
    data: str
    rows: Sequence[dict[str, Any]]
    node: NodeResources


@dataclass(frozen=True)
class RecipeDraft:
    """A recipe for `verb`: its settings but for run and model.

    Attributes:
        verb: the verb that reads the recipe.
        guesses: the settings, in order.
        try_out: reads the written file as the verb would and prints what it finds; raises
            UserError.
        has_dry_run: whether the verb has --dry-run."""

    verb: str
    guesses: Sequence[Guess]
    try_out: Callable[[Path], None]
    has_dry_run: bool = True


def recipe_text(title: Sequence[str], guesses: Sequence[Guess]) -> str:
    """Return a recipe that sets each key, its reason in a comment above.

    Args:
        title: the first lines.
        guesses: the keys with their values and reasons."""
    lines = [f"# {line}" for line in title]
    by_section: dict[str, list[Guess]] = {name: [] for name in SECTION_ORDER}
    for guess in guesses:
        by_section[guess.key.partition(".")[0]].append(guess)
    for section, section_guesses in by_section.items():
        if section_guesses:
            lines.append(f"{section}:")
        for guess in section_guesses:
            lines += textwrap.wrap(
                guess.reason, LINE_WIDTH, initial_indent="  # ", subsequent_indent="  # "
            )
            lines.append(f"  {guess.key.partition('.')[2]}: {yaml_value_text(guess.value)}")
    return "\n".join(lines) + "\n"
