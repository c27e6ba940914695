"""A verb of the command line: what its module must define, and what it may."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config import Config


def accept(config: Config) -> None:
    """Accept any settings: the check of a verb whose module defines none."""


def not_run_here(*arguments: object) -> None:
    """Raise NotImplementedError: the `run` of a verb whose module defines none."""
    raise NotImplementedError("the command line runs this verb itself")


@dataclass(frozen=True)
class VerbModule:
    """A verb as its module defines it. The module must have `run`, but for preflight's, which the
    command line runs itself; all else is optional."""

    about: str | None
    """the module's docstring, which --help prints"""
    run: Callable[..., None]
    """`run`, whose arguments depend on the kind of verb: see VERBS, COMMANDS and OTHERS of `cli`"""
    arguments: Sequence[str]
    """ARGUMENTS, the names of the arguments behind the verb; default: a recipe"""
    required: tuple[str, ...]
    """REQUIRED, the keys that a recipe must set"""
    settings: Sequence[str]
    """SETTINGS, the sections and keys that --help describes, and the only ones that a verb without
    a recipe accepts; default: the section that is called as the verb"""
    options: Sequence[str]
    """OPTIONS, the names of options outside the recipe, which `run` takes as keywords"""
    implied: Mapping[str, Any]
    """IMPLIED, the settings that the verb adds to a recipe"""
    check: Callable[[Config], None]
    """`check`, which raises UserError for settings that only the verb can check"""
    of_run: Callable[[str], tuple[str, dict[str, Any]]] | None
    """`of_run`, which returns recipe and added settings where a run's folder stands for the
    recipe"""
    dry_run: Callable[[Config], None] | None
    """`dry_run`, which --dry-run calls in place of `run`"""


def load_verb(name: str, module_name: str) -> VerbModule:
    """Import the module of the verb `name` and return the verb."""
    module = importlib.import_module(module_name)
    return VerbModule(
        about=inspect.getdoc(module),
        run=getattr(module, "run", not_run_here),
        arguments=getattr(module, "ARGUMENTS", ("RECIPE.yaml",)),
        required=getattr(module, "REQUIRED", ()),
        settings=getattr(module, "SETTINGS", (name.replace("-", "_"),)),
        options=getattr(module, "OPTIONS", ()),
        implied=getattr(module, "IMPLIED", {}),
        check=getattr(module, "check", accept),
        of_run=getattr(module, "of_run", None),
        dry_run=getattr(module, "dry_run", None),
    )
