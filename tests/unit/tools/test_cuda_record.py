"""Whether the record of the tests on a null GPU is of the present code."""

import json
import subprocess

import pytest

from tools import cuda_record


def git(tree, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", tree, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git(tmp_path, "init", "-q")
    for covered in cuda_record.COVERED_PATHS:
        path = tmp_path / (covered + "code.py" if covered.endswith("/") else covered)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def chosen_experts():\n    return 1\n")
    (tmp_path / "kernels/r1_kernels/primitives/sum_triton.py").write_text("SUM = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "--no-verify", "-m", "Begin")
    record = {"commit": git(tmp_path, "rev-parse", "HEAD"), "date": "2026-01-02"}
    record |= {"passed": 33, "failed": 0, "skipped": 1}
    (tmp_path / cuda_record.RECORD).write_text(json.dumps(record))
    git(tmp_path, "add", ".")
    return tmp_path


def test_a_record_is_current_until_a_covered_file_computes_something_else(tree):
    commit = git(tree, "rev-parse", "HEAD")
    current = f"is current: 33 passed, 0 failed at {commit}, 2026-01-02"
    assert current in cuda_record.record_state(tree)
    (tree / "README.md").write_text("other")
    code = tree / "megatron_r1/models/code.py"
    code.write_text(f'"""Docs."""\n\n{code.read_text()}  # why\n')
    assert current in cuda_record.record_state(tree)
    code.write_text(code.read_text().replace("1", "2"))
    text = cuda_record.record_state(tree)
    assert "is old" in text and "megatron_r1/models/code.py" in text and "trainer" not in text


def test_a_kernel_of_gpus_alone_is_covered(tree):
    (tree / "kernels/r1_kernels/primitives/sum_triton.py").write_text("SUM = 2\n")
    assert "primitives/sum_triton.py changed" in cuda_record.record_state(tree)


def test_a_file_that_goes_makes_the_record_old(tree):
    git(tree, "mv", "megatron_r1/push/code.py", "other.py")
    assert "megatron_r1/push/code.py changed" in cuda_record.record_state(tree)


def test_a_clone_without_the_commit_cannot_tell(tree):
    path = tree / cuda_record.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "0" * 40}))
    assert "does not have the commit" in cuda_record.record_state(tree)


def test_without_a_record_the_command_is_named(tree):
    (tree / cuda_record.RECORD).unlink()
    assert "make test-cuda" in cuda_record.record_state(tree)
