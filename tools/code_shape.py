"""Find statements bent to save lines: `python tools/code_shape.py [PATH …]`, in `make lint`.

A tuple or list that is only starred into a call hides which argument is which, one starred into
another tuple or list is there to fill lines, and a parallel assignment over several lines separates
each name from its value. Starred literals are found in all folders but tests, where command lines
are grouped by option; assignments everywhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

Finding = tuple[int, str]
"""A line, from 1, and what to write there."""
Display = ast.Tuple | ast.List | ast.Set
"""A literal of several values."""


def find_starred_literals(tree: ast.Module) -> Iterator[Finding]:
    """Yield the tuples, lists and sets that are written in a call, or in another tuple, list or
    set, only to be unpacked."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for line in _starred_literals(node.args):
                yield line, "a starred literal in a call: name or list its arguments"
        elif isinstance(node, Display):
            for line in _starred_literals(node.elts):
                yield line, "a starred literal in another literal: list its values there"


def _starred_literals(values: list[ast.expr]) -> Iterator[int]:
    """Yield the lines of the starred literals among these values."""
    for value in values:
        if isinstance(value, ast.Starred) and isinstance(value.value, Display):
            yield value.lineno


def find_parallel_assignments(tree: ast.Module) -> Iterator[Finding]:
    """Yield assignments of tuples to tuples that take several lines."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and node.lineno != node.end_lineno
            and isinstance(node.value, ast.Tuple | ast.List)
            and any(isinstance(target, ast.Tuple | ast.List) for target in node.targets)
        ):
            yield node.lineno, "a parallel assignment over several lines: write one per name"


def find_bent_statements(name: str, source: str) -> list[Finding]:
    """Return the findings of a file in order.

    Args:
        name: its path in the repository.
        source: its text."""
    tree = ast.parse(source)
    findings = list(find_parallel_assignments(tree))
    if not name.startswith("tests/"):
        findings += find_starred_literals(tree)
    return sorted(findings)


def main(root: Path, paths: list[str]) -> int:
    """Print every finding below `root`, in `paths` or everywhere; return the exit status."""
    command = ["git", "ls-files", "--", *(paths or ["."])]
    output = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    status = 0
    for name in output.splitlines():
        path = root / name
        if path.suffix != ".py" or not path.exists():
            continue
        for line, advice in find_bent_statements(name, path.read_text(encoding="utf-8")):
            print(f"{name}:{line}: {advice}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1], sys.argv[1:]))
