"""Functions of the user's own: found where commands are started, without being run."""

import sys

import pytest

from megatron_r1.user_code import source_of, syntax_of


@pytest.mark.parametrize("is_package", [True, False])
def test_a_module_in_folders_of_folders_is_found_and_not_run(tmp_path, monkeypatch, is_package):
    inner = tmp_path / "outer_of_mine" / "inner"
    inner.mkdir(parents=True)
    (inner / "made.py").write_text("raise RuntimeError  # when run\n")
    if is_package:
        for folder in (inner, inner.parent):
            (folder / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert source_of("outer_of_mine.inner.made:write").startswith("raise RuntimeError")
    assert syntax_of("outer_of_mine.inner.made:write") == syntax_of(
        "outer_of_mine.inner.made:other"
    )
    assert "outer_of_mine" not in sys.modules


@pytest.mark.parametrize("module", ["outer_of_mine", "outer_of_mine.nothing", "nothing_at_all"])
def test_a_mere_folder_is_no_module_and_nothing_is_none(tmp_path, monkeypatch, module):
    (tmp_path / "outer_of_mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no Python module {module} can be found"):
        source_of(f"{module}:write")
