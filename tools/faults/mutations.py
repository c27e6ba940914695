"""The planted faults of tests/faults/mutations.yaml, and the source text that each one changes.

A fault is kept by symbol and text, not by file and line: it is looked for in every file of its
room, and must be found exactly once."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TABLE = Path("tests/faults/mutations.yaml")
FOLDERS = {
    "grading": "grading/r1_grading",
    "kernels": "kernels/r1_kernels",
    "examples": "examples",
}
"""Rooms outside of megatron_r1; every other room is one of its packages or modules."""


@dataclass(frozen=True)
class Mutation:
    """One entry of the table.

    room: package that has the symbol. symbol: qualified name of a function, class or variable
    within its module. replace: text that is found once in the symbol's source. by: the text in its
    place. fault: what is then wrong. tests: `file.py` or `file.py::test`. survives: why no test can
    catch it, or None."""

    room: str
    symbol: str
    replace: str
    by: str
    fault: str
    tests: tuple[str, ...]
    survives: str | None = None

    @property
    def name(self) -> str:
        return f"{self.room}: {self.symbol}: {self.replace!r} -> {self.by!r}"


@dataclass(frozen=True)
class Mutant:
    """A mutation in a source tree: the file, relative to the tree's root, before and after."""

    mutation: Mutation
    path: Path
    before: str
    after: str


def read_table(root: Path) -> list[Mutation]:
    """Return the entries of the table in order. Raises TypeError for an unknown or missing key."""
    rooms = yaml.safe_load((root / TABLE).read_text(encoding="utf-8"))
    return [
        Mutation(room, **(entry | {"tests": tuple(entry["tests"])}))
        for room, entries in rooms.items()
        for entry in entries
    ]


def rooms(root: Path) -> list[str]:
    """Return the names of all rooms: packages of megatron_r1, and `FOLDERS`."""
    packages = (root / "megatron_r1").glob("*/__init__.py")
    return sorted([*(path.parent.name for path in packages), *FOLDERS])


def plant(mutation: Mutation, root: Path) -> Mutant:
    """Return the mutated file. Raises ValueError, naming the entry, where the text is not found
    exactly once within the symbol, or the result is no Python or means the same."""
    found = list(_places(mutation, root))
    if len(found) != 1:
        where = ", ".join(
            f"{path}:{before.count(chr(10), 0, at) + 1}" for path, before, at in found
        )
        raise ValueError(f"{mutation.name}: found {len(found)} times ({where or 'nowhere'})")
    [(path, before, start)] = found
    after = before[:start] + mutation.by + before[start + len(mutation.replace) :]
    try:
        is_same = ast.dump(ast.parse(after)) == ast.dump(ast.parse(before))
        compile(after, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ValueError(f"{mutation.name}: the result does not compile: {error}") from error
    if is_same:
        raise ValueError(f"{mutation.name}: the result means the same")
    return Mutant(mutation, path, before, after)


def covering_tests(mutation: Mutation, root: Path) -> list[tuple[Path, str]]:
    """Return the covering tests: file, relative to the root, and node within it or "". Raises
    ValueError, naming the entry, for a file that is not found exactly once, or lacks the test."""
    found = []
    for test in mutation.tests:
        file, _, node = test.partition("::")
        paths = _tests_by_name(root).get(file, [])
        if len(paths) != 1:
            raise ValueError(f"{mutation.name}: {len(paths)} files of tests are named {file}")
        name = node.partition("[")[0].rpartition("::")[2]
        if name and f"def {name}(" not in (root / paths[0]).read_text(encoding="utf-8"):
            raise ValueError(f"{mutation.name}: {paths[0]} has no test {name}")
        found.append((paths[0], node))
    return found


def digest(*texts: str) -> str:
    """Return a key of the texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()[:24]


def _places(mutation: Mutation, root: Path) -> Iterator[tuple[Path, str, int]]:
    """Yield (file, its text, offset) of every place that the entry describes."""
    for path, text in _sources(root, mutation.room):
        if mutation.replace not in text:
            continue
        for start, end in _spans(text).get(mutation.symbol, ()):
            at = text.find(mutation.replace, start, end)
            while at >= 0:
                yield path, text, at
                at = text.find(mutation.replace, at + 1, end)


@cache
def _sources(root: Path, room: str) -> list[tuple[Path, str]]:
    base = root / FOLDERS.get(room, f"megatron_r1/{room}")
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return [(file.relative_to(root), file.read_text(encoding="utf-8")) for file in files]


@cache
def _tests_by_name(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        found.setdefault(path.name, []).append(path.relative_to(root))
    return found


@cache
def _spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """Return qualified name -> spans of the definitions of a module, as offsets in `text`."""
    lines = [0]
    for line in text.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    found: dict[str, list[tuple[int, int]]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names, first = [node.name], min([node, *node.decorator_list], key=_line).lineno
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                first = node.lineno
            else:
                continue
            for name in names:
                span = lines[first - 1], lines[node.end_lineno or first]
                found.setdefault(prefix + name, []).append(span)

    visit(ast.parse(text).body, "")
    return found


def _line(node: ast.stmt | ast.expr) -> int:
    return node.lineno
