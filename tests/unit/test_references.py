"""Dotted names in docstrings and comments are those of modules, of what they define, or of keys."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from megatron_r1.config import Config
from megatron_r1.config.keys import dotted_keys
from megatron_r1.pipeline.pipeline_recipe import PipelineRecipe
from megatron_r1.rehearse.settings import PreflightRecipe, RehearsalRecipe

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_r1", "kernels", "grading", "tools")
HOMES = {"megatron_r1": ROOT, "r1_kernels": ROOT / "kernels", "r1_grading": ROOT / "grading"}
"""Package -> the folder that it is in."""
PACKAGES = [path.parent.name for path in ROOT.glob("megatron_r1/*/__init__.py")]
NAME = re.compile(rf"`((?:{'|'.join([*PACKAGES, *HOMES])})(?:\.\w+)+)(?:\(\))?`")
FILE_ENDINGS = (".html", ".json", ".jsonl", ".py", ".yaml")
RECIPES = (Config, PipelineRecipe, RehearsalRecipe, PreflightRecipe)
KEYS = [key for recipe in RECIPES for key, _ in dotted_keys(recipe)]
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def is_key(name: str) -> bool:
    """Whether it is a key or a section of a recipe, also as an attribute of a `config`."""
    pattern = re.compile(rf"{re.escape(name.removeprefix('config.'))}(?:[.\[]|\Z)")
    return any(map(pattern.match, KEYS))


class Names(NamedTuple):
    """The names that a module defines or imports, and all that anything in it sets."""

    own: frozenset[str]
    all: frozenset[str]


def names_set(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, DEFINITIONS):
            yield each.name
        elif isinstance(each, ast.alias):
            yield each.asname or each.name
        elif isinstance(each, ast.Name | ast.Attribute) and isinstance(each.ctx, ast.Store):
            yield each.id if isinstance(each, ast.Name) else each.attr


@cache
def names_in(source: Path) -> Names:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    own = ([node.name] if isinstance(node, DEFINITIONS) else names_set(node) for node in tree.body)
    return Names(frozenset(name for names in own for name in names), frozenset(names_set(tree)))


def is_defined(folder: Path, name: str) -> bool:
    """Whether a name is that of a module below `folder`, or of what such a module defines."""
    path, parts = folder, name.split(".")
    while parts and ((path / parts[0]).is_dir() or (path / f"{parts[0]}.py").is_file()):
        path /= parts.pop(0)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if path == folder or not parts or not source.is_file():
        return path != folder and not parts
    names = names_in(source)
    return parts[0] in names.own and names.all.issuperset(parts)


def folders_above(file: Path) -> list[Path]:
    return list(takewhile(ROOT.__ne__, file.parents))


def wrong_names(text: str, folders: list[Path]) -> list[str]:
    """Return the names in a text that are no keys, and that neither the package of the name nor
    one of `folders` has."""

    def is_right(name: str) -> bool:
        home = HOMES.get(name.partition(".")[0], ROOT / "megatron_r1")
        is_other = name.endswith(FILE_ENDINGS) or is_key(name)
        return is_other or any(is_defined(folder, name) for folder in [home, *folders])

    return [name for name in NAME.findall(text) if not is_right(name)]


def test_names_in_docstrings_and_comments_exist():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    assert sum(len(NAME.findall(text)) for text in texts.values()) > 200
    wrong = {
        str(file.relative_to(ROOT)): names
        for file, text in texts.items()
        if (names := wrong_names(text, folders_above(file)))
    }
    assert wrong == {}


def test_names_that_do_not_exist_are_found():
    right = [
        "config.rl",
        "config.schedule.digest_until",
        "config.rollout.engines",
        "push.timeout_seconds",
        "rollout.vllm",
        "trainer.trainer.Trainer.update",
        "r1_kernels.registry.KERNELS",
    ]
    wrong = [
        "config.hardware",
        "config.rl.digest_until",
        "push.timeout_hours",
        "trainer.result_decoding",
        "trainer.trainer.Trainer.downdate",
        "megatron_r1.rl",
        "r1_grading.rewards.nothing()",
    ]
    text = " ".join(f"`{name}`" for name in [*right, *wrong])
    assert wrong_names(text, []) == [name.removesuffix("()") for name in wrong]
