"""A verb of the command line: what its module must define, and what it may."""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config import Config

HEADER_CONSTANTS = {
    "ARGUMENTS",
    "REQUIRED_KEYS",
    "SETTINGS",
    "OPTIONS",
    "REPEATED_OPTIONS",
    "ALTERNATIVE_OPTIONS",
    "IMPLIED_SETTINGS",
}


def accept_any_settings(config: Config) -> None:
    """Accept any settings: the check of a verb whose module defines none."""


@dataclass(frozen=True)
class VerbHeader:
    """What a verb's module says about the verb: literals, which are read without running it."""

    about: str | None
    """the module's docstring, which --help prints"""
    arguments: Sequence[str]
    """ARGUMENTS, the names of the arguments behind the verb; default: a recipe"""
    required_keys: tuple[str, ...]
    """REQUIRED_KEYS, the keys that a recipe must set"""
    settings: Sequence[str]
    """SETTINGS, the sections and keys that --help describes, and the only ones that a verb without
    a recipe accepts; default: the section that is called as the verb"""
    options: Mapping[str, str]
    """OPTIONS, name → what its value is, of options outside the recipe, which `run` takes as
    keywords"""
    repeated_options: Sequence[str]
    """REPEATED_OPTIONS, those of them that may be given several times, and are lists of text"""
    alternative_options: Sequence[str]
    """ALTERNATIVE_OPTIONS, those of them with which the verb takes no arguments"""
    implied_settings: Mapping[str, Any]
    """IMPLIED_SETTINGS, the settings that the verb adds to a recipe"""


@dataclass(frozen=True)
class VerbModule(VerbHeader):
    """A verb as its module defines it. The module must have `run`; all else is optional."""

    run: Callable[..., None]
    """`run`, whose arguments depend on the kind of verb: see RECIPE_VERBS, RECIPELESS_VERBS and
    RECIPE_FILE_VERBS of `cli`"""
    check: Callable[[Config], None]
    """`check`, which raises UserError for settings that only the verb can check"""
    from_run: Callable[[str], tuple[str, dict[str, Any]]] | None
    """`from_run`, which returns recipe and added settings where a run's folder stands for the
    recipe"""
    dry_run: Callable[[Config], None] | None
    """`dry_run`, which --dry-run calls in place of `run`"""


def load_verb(name: str, module_name: str) -> VerbModule:
    """Import the module of the verb `name` and return the verb."""
    module = importlib.import_module(module_name)
    return VerbModule(
        **_verb_header(name, module.__doc__, vars(module)),
        run=module.run,
        check=getattr(module, "check", accept_any_settings),
        from_run=getattr(module, "from_run", None),
        dry_run=getattr(module, "dry_run", None),
    )


def read_verb(name: str, module_name: str) -> VerbHeader:
    """Return what the module's source says about the verb, without its imports: these take one to
    two seconds."""
    spec = importlib.util.find_spec(module_name)
    assert spec is not None and spec.origin is not None, module_name
    source = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    literals = {
        target.id: ast.literal_eval(line.value)
        for line in source.body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name) and target.id in HEADER_CONSTANTS
    }
    return VerbHeader(**_verb_header(name, ast.get_docstring(source, clean=False), literals))


def _verb_header(name: str, docstring: str | None, constants: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "about": inspect.cleandoc(docstring) if docstring else None,
        "arguments": constants.get("ARGUMENTS", ("RECIPE.yaml",)),
        "required_keys": constants.get("REQUIRED_KEYS", ()),
        "settings": constants.get("SETTINGS", (name.replace("-", "_"),)),
        "options": constants.get("OPTIONS", {}),
        "repeated_options": constants.get("REPEATED_OPTIONS", ()),
        "alternative_options": constants.get("ALTERNATIVE_OPTIONS", ()),
        "implied_settings": constants.get("IMPLIED_SETTINGS", {}),
    }
