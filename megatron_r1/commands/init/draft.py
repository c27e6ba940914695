"""What a recipe is written for, and the recipe before it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.commands.recipe_sizes import Guess, Machine


@dataclass(frozen=True)
class Source:
    """A model's folder and the first rows of a data file. hf: the model's `config.json`.
    parameters: their number."""

    folder: Path
    hf: dict[str, Any]
    parameters: int
    data: str
    rows: Sequence[dict[str, Any]]
    machine: Machine


@dataclass(frozen=True)
class Draft:
    """A recipe for `verb`: its settings but for run and model. try_out: reads the written file as
    the verb would and prints what it finds; raises UserError. has_dry_run: whether the verb has
    --dry-run."""

    verb: str
    guesses: Sequence[Guess]
    try_out: Callable[[Path], None]
    has_dry_run: bool = True
