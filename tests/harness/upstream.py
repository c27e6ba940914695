"""Sources of installed packages, by file and symbol, without importing them.

A docstring that gives an upstream function as the reason of a patch is right as long as that
function is the same: line numbers move with every release, symbols and their sources do not."""

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

from megatron_r1.models.patch_type import Patch


@functools.cache
def folder(package: str) -> Path:
    """Return the folder of an installed package; for a namespace package, its only one."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _module(file: Path) -> tuple[str, ast.Module]:
    text = file.read_text()
    return text, ast.parse(text)


def source(package: str, file: str, symbol: str) -> str:
    """Return the source of `Class.method`, a function or, with "", the module.

    Raises KeyError naming the symbol where the file has none of that name."""
    text, node = _module(folder(package) / file)
    for name in filter(None, symbol.split(".")):
        definitions = [part for part in ast.walk(node) if getattr(part, "name", None) == name]
        if not definitions:
            raise KeyError(f"{file} has no {symbol}")
        node = definitions[-1]  # of several definitions, the one that is in force
    return ast.get_source_segment(text, node) or text


def fingerprint(package: str, file: str, symbol: str) -> str:
    """Return a hash of the source, whatever its line breaks."""
    return hashlib.sha256("".join(source(package, file, symbol).split()).encode()).hexdigest()[:16]


def check(patch: Patch) -> None:
    """Fail where Megatron-Core no longer has the line that `patch` answers."""
    file, _, symbol = patch.upstream.partition(":")
    text = source("megatron", f"core/{file}", symbol)
    assert patch.text in text, f"{patch.upstream} has no {patch.text} any more"
