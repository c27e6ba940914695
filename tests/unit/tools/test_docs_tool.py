"""tools/docs: its packages are documented, and become pages where pdoc is installed."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.docs.__main__ import PACKAGES, write_pages


def modules(package: str) -> list[Path]:
    spec = find_spec(package)
    assert spec and spec.origin
    return sorted(Path(spec.origin).parent.rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_page_that_begins_with_a_docstring(package):
    paths = modules(package)
    assert len(paths) > 10
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    bare = [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not bare


def test_pages_are_written(tmp_path):
    pytest.importorskip("pdoc", reason="needs requirements/docs.txt")
    assert write_pages(tmp_path, ["r1_kernels.reference"]) >= 1
    assert "policy_loss" in (tmp_path / "r1_kernels/reference.html").read_text()
