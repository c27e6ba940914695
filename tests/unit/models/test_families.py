"""The table of architectures names the places of all exceptions to it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.models import families
from megatron_r1.models.families import FAMILIES

ROOT = Path(families.__file__).parents[1]
ROPE_TYPES = {rope for family in FAMILIES.values() for rope in family.rope_types}


def names_in_code(source: str) -> Iterator[str]:
    """Yield names and texts of a module, but not its docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            text = str(node.value)
            if not re.search(r"\s", text):  # a name, not a sentence for the user
                yield text


def plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@pytest.mark.more
def test_every_module_that_names_an_architecture_is_listed():
    architectures = [plain(name) for name in FAMILIES]
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        for name in set(names_in_code(path.read_text(encoding="utf-8"))) - ROPE_TYPES
        if any(architecture in plain(name) for architecture in architectures)
    }
    listed = re.findall(r"^- `([\w.]+)`:", families.__doc__, re.M)
    assert sorted(listed) == sorted(found - {"models.families"})
