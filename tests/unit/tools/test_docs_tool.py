"""tools/docs: its packages are documented, and become pages where pdoc is installed."""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from r1_kernels.vocabulary import VocabShard
from ranks import run_script

from tools.docs.__main__ import PACKAGES

ROOT = Path(__file__).parents[3]


def modules(package: str) -> list[Path]:
    spec = find_spec(package)
    assert spec and spec.origin
    return sorted(Path(spec.origin).parent.rglob("*.py"))


@pytest.mark.more
@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_page_that_begins_with_a_docstring(package):
    paths = modules(package)
    assert len(paths) > 10
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    bare = [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not bare


@pytest.mark.more
def test_pages_are_written(tmp_path):
    pytest.importorskip("pdoc", reason="make test-packages")
    # In a process of its own, because it prepares Megatron for a CPU.
    program = "import sys; from pathlib import Path; from tools.docs.__main__ import write_pages; "
    program += "write_pages(Path(sys.argv[1]), ['r1_kernels.vocabulary'])"
    run_script(ROOT, ["-c", program, str(tmp_path)])
    page = (tmp_path / "r1_kernels/vocabulary.html").read_text()
    assert 'id="VocabShard"' in page and inspect.getdoc(VocabShard).split(".")[0] in page
