"""Whether the record of the tests on a null GPU is of the present files."""

import json
import subprocess

import pytest

from tools import cuda_record


@pytest.fixture
def tree(tmp_path):
    for covered in cuda_record.COVERED_PATHS:
        path = tmp_path / covered
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("1")
        else:
            path.mkdir()
            (path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    record = {"commit": "abc", "date": "2026-01-02", "passed": 33, "failed": 0, "skipped": 1}
    record["files"] = cuda_record.digests(tmp_path)
    (tmp_path / cuda_record.RECORD).write_text(json.dumps(record))
    return tmp_path


def test_a_record_is_current_until_a_covered_file_changes(tree):
    assert "is current: 33 passed, 0 failed at abc, 2026-01-02" in cuda_record.record_state(tree)
    (tree / "README.md").write_text("other")
    assert "is current" in cuda_record.record_state(tree)
    (tree / "megatron_r1/models/code.py").write_text('"""Docs."""\n\n1  # why\n')
    assert "is current" in cuda_record.record_state(tree), "comments and docstrings compute nothing"
    (tree / "megatron_r1/models/code.py").write_text("2")
    said = cuda_record.record_state(tree)
    assert "is old" in said and "megatron_r1/models" in said and "trainer" not in said


def test_a_file_that_moves_or_goes_makes_the_record_old(tree):
    subprocess.run(["git", "-C", tree, "mv", "kernels/r1_kernels/code.py", "other.py"], check=True)
    assert "kernels/r1_kernels" in cuda_record.record_state(tree)


def test_without_a_record_the_command_is_named(tree):
    (tree / cuda_record.RECORD).unlink()
    assert "make test-cuda" in cuda_record.record_state(tree)
