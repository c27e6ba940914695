"""Functions of the user's own: found where commands are started, without being run."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.user_code import find_function, module_source, module_syntax


@pytest.mark.parametrize("is_package", [True, False])
def test_a_module_in_folders_of_folders_is_found_and_not_run(tmp_path, monkeypatch, is_package):
    inner = tmp_path / "outer_of_mine" / "inner"
    inner.mkdir(parents=True)
    (inner / "made.py").write_text("raise RuntimeError  # when run\n")
    if is_package:
        for folder in (inner, inner.parent):
            (folder / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert module_source("outer_of_mine.inner.made:write").startswith("raise RuntimeError")
    assert module_syntax("outer_of_mine.inner.made:write") == module_syntax(
        "outer_of_mine.inner.made:other"
    )
    assert "outer_of_mine" not in sys.modules


@pytest.mark.parametrize("module", ["outer_of_mine", "outer_of_mine.nothing", "nothing_at_all"])
def test_a_mere_folder_is_no_module_and_nothing_is_none(tmp_path, monkeypatch, module):
    (tmp_path / "outer_of_mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with refused(f"{module}:write", Cause.NOT_FOUND, tmp_path):
        module_source(f"{module}:write")


def test_a_function_that_is_not_there_and_a_module_that_is_no_python_are_named(
    tmp_path, monkeypatch
):
    (tmp_path / "mine_alone.py").write_text("def write(): ...\n")
    (tmp_path / "torn.py").write_text("def write(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with refused("mine_alone:wrte", Cause.NOT_FOUND, "'write'"):
        find_function("mine_alone:wrte")
    with refused("not_there:write", Cause.NOT_FOUND, tmp_path):
        find_function("not_there:write")
    with refused("torn:write", Cause.MALFORMED, 1):
        module_syntax("torn:write")


@pytest.mark.more
def test_threads_read_the_syntax_of_a_module_at_the_same_time(tmp_path, monkeypatch):
    """Garbage collections let another thread go on, which makes the depth mismatch likely."""
    (tmp_path / "long.py").write_text("x = f(1, [2, (3, {4: 5 + 6})])\n" * 400)
    monkeypatch.chdir(tmp_path)
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10)
    gc.callbacks.append(_collected)
    try:
        with ThreadPoolExecutor(4) as threads:
            trees = list(threads.map(module_syntax, ["long:f"] * 20))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.callbacks.remove(_collected)
    assert len(set(trees)) == 1


def _collected(phase, info):
    """Python code, at whose end the interpreter may change to another thread."""


def test_the_former_name_of_a_package_says_where_the_new_one_stands():
    name = "megatron_r1.weight_sync.plan:order"
    with refused(name, Cause.NOT_FOUND, "megatron_r1.weight_sync", "CHANGELOG_RENAMES.md"):
        find_function(name)
