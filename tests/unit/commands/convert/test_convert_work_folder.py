"""The folder of a conversion that is killed while it is finished."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.convert import work_folder
from megatron_r1.commands.convert.work_folder import WorkFolder

PLAN, OTHER = {"dtype": "float32"}, {"dtype": "bfloat16"}


def killed(*arguments):
    raise KeyboardInterrupt


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def begin(out):
    work = WorkFolder(out, PLAN)
    (work.path / "__0_0.distcp").write_text("float32")
    return work


@pytest.mark.parametrize("place", ["last", "fsync"])
def test_it_is_continued_and_by_no_other_plan(out, monkeypatch, place):
    work = begin(out)
    with monkeypatch.context() as patch:
        if place == "fsync":
            patch.setattr(work_folder, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            work.finish(killed if place == "last" else lambda folder: None)
    with refused("out", Cause.CHANGED):
        WorkFolder(out, OTHER)
    seen = []
    WorkFolder(out, PLAN).finish(lambda folder: seen.extend(folder.iterdir()))
    assert [file.name for file in seen] == ["__0_0.distcp"]
    assert [file.name for file in out.iterdir()] == ["__0_0.distcp"]
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_that_was_removed_may_be_made_by_another_plan(out):
    with pytest.raises(KeyboardInterrupt):
        begin(out).finish(killed)
    incomplete = out.with_name("out.incomplete")
    (incomplete / "__0_0.distcp").unlink()
    incomplete.rmdir()
    WorkFolder(out, OTHER).finish()
    assert list(out.iterdir()) == [] and list(out.parent.iterdir()) == [out]
