import pytest

from tools.house.structure import arrows, closure, modules, num_words
from tools.house.walks import stops

FILES = {
    "megatron_r1/__init__.py": "",
    "megatron_r1/low/__init__.py": "",
    "megatron_r1/low/base.py": "import os",
    "megatron_r1/high/__init__.py": "from megatron_r1.high.start import run",
    "megatron_r1/high/start.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from megatron_r1.low import types\n"
        "def run():\n    from megatron_r1.low.base import name\n"
    ),
    "megatron_r1/low/types.py": "",
    "kernels/r1_kernels/__init__.py": "",
    "README.md": "two words\n```\nnot these three\n```\n",
    "CONTRIBUTING.md": "one",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_what_a_module_can_import_has_its_packages_and_functions_not_annotations(root):
    known = modules(root)
    assert closure(known, ("megatron_r1.high.start",)) == {
        "megatron_r1",
        "megatron_r1.high",
        "megatron_r1.high.start",
        "megatron_r1.low",
        "megatron_r1.low.base",
    }
    assert arrows(known) == {("high", "low"): 1}
    assert num_words(root) == 3


def test_a_walk_has_each_file_once_from_its_first_function_to_the_next_last_one():
    names = [("c", "end"), ("a", "begin"), ("b", "x"), ("a", "begin"), ("c", "end"), ("d", "x")]
    entered = [(time, file, name) for time, (file, name) in enumerate(names)]
    assert stops(entered, "a begin", "end") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="d x"):
        stops(entered, "d x", "begin")
