"""Whether the record of the tests on a null GPU is of the present files."""

import json
import py_compile
import shutil
import subprocess

import pytest

from tools import cuda_record
from tools.opened_files import run_traced

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
TESTS = """
import subprocess, sys
import once
import module
def test_passes():
    subprocess.run([sys.executable, "-c", "open('recipe.yaml')"], check=True)
def test_fails():
    assert not open("README.md").read()
"""


def git(tree, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", tree, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def endings(tree) -> dict[str, tuple[int, int, int]]:
    record = json.loads((tree / cuda_record.RECORD).read_text())
    return {name: (r["passed"], r["failed"], r["skipped"]) for name, r in record.items()}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository whose tests open all of its files but unused.py."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("PYTHONPATH", f"{cuda_record.ROOT}:{tmp_path}", prepend=":")
    monkeypatch.setattr(cuda_record, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "tests/nullgpu").mkdir(parents=True)
    (tmp_path / "tests/nullgpu/test_all.py").write_text(TESTS)
    (tmp_path / "recipe.yaml").write_text("lr: 1\n")
    (tmp_path / ".gitignore").write_text("once.py\n__pycache__\n.pytest_cache\n")
    for name in ("module.py", "once.py", "unused.py", "README.md"):
        (tmp_path / name).write_text("# a comment\n")
    py_compile.compile("module.py", doraise=True)  # the tests open its cache

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "--no-verify", "-m", "Begin")
    return tmp_path


@pytest.fixture
def recorded(tree):
    assert cuda_record.run(["-q"]) == 1
    return tree


@needs_strace
def test_the_record_is_of_the_files_that_the_tests_and_their_processes_open(recorded):
    assert endings(recorded) == {"test_all.py": (1, 1, 0)}
    lines = (recorded / cuda_record.OPENED).read_text().splitlines()
    names = {line.split(" ", 1)[1] for line in lines}
    expected = {"module.py", "recipe.yaml", "tests/nullgpu/test_all.py"}
    assert names == {f"{name} test_all.py" for name in expected}
    state = cuda_record.record_state(recorded)
    assert f"is current: 1 passed, 1 failed at {git(recorded, 'rev-parse', 'HEAD')[:8]}" in state


@needs_strace
def test_a_changed_or_deleted_file_makes_the_record_old_if_it_was_opened(recorded):
    for name in ("unused.py", "README.md", "once.py"):
        (recorded / name).write_text("SUM = 2\n")
    assert "is current" in cuda_record.record_state(recorded)
    (recorded / "module.py").write_text("# another comment\n")
    state = cuda_record.record_state(recorded)
    assert "is old" in state and ": module.py changed" in state
    (recorded / "recipe.yaml").unlink()
    assert ": module.py changed, recipe.yaml changed;" in cuda_record.record_state(recorded)


@needs_strace
def test_tests_that_the_record_does_not_have_are_named(recorded):
    (recorded / "tests/nullgpu/test_other.py").write_text("def test_other(): pass\n")
    state = cuda_record.record_state(recorded)
    assert "is old" in state and ": tests/nullgpu/test_other.py is new;" in state


@needs_strace
@pytest.mark.more
def test_only_tests_whose_record_is_old_or_failed_are_run_again(tree):
    tests = tree / "tests/nullgpu"
    (tests / "test_more.py").write_text("import unused\ndef test_more(): pass\n")
    (tests / "test_ran.py").write_text("open('.gitignore')\ndef test_ran(): pass\n")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "--no-verify", "-m", "Add")
    assert cuda_record.run(["-q"]) == 1
    first = {"test_all.py": (1, 1, 0), "test_more.py": (1, 0, 0), "test_ran.py": (1, 0, 0)}
    assert endings(tree) == first
    before = json.loads((tree / cuda_record.RECORD).read_text())
    (tree / "unused.py").write_text("SUM = 3\n")
    (tests / "test_all.py").write_text("def test_passes(): pass\n")
    git(tree, "commit", "-aqm", "Change", "--no-verify")
    assert cuda_record.run(["-q"]) == 0
    assert endings(tree) == first | {"test_all.py": (1, 0, 0)}
    after = json.loads((tree / cuda_record.RECORD).read_text())
    assert [name for name in before if after[name]["commit"] == before[name]["commit"]] == [
        "test_ran.py"
    ]
    opened = (tree / cuda_record.OPENED).read_text()
    assert "recipe.yaml" not in opened and ".gitignore test_ran.py\n" in opened


@needs_strace
def test_nothing_is_recorded_of_files_that_are_not_committed(tree, capfd):
    (tree / "recipe.yaml").write_text("lr: 2\n")
    cuda_record.run(["-q"])
    assert not (tree / cuda_record.RECORD).exists() and "M recipe.yaml" in capfd.readouterr().out
    git(tree, "commit", "-aq", "--no-verify", "-m", "Change")
    cuda_record.run(["-q", "-k", "passes"])
    assert not (tree / cuda_record.RECORD).exists()


def test_without_a_record_the_command_is_named(tree):
    assert "make test-cuda" in cuda_record.record_state(tree)


@needs_strace
def test_names_are_given_as_they_were_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    script = f"cd {tmp_path}/folder && cat ../link missing; exit 3"
    status, opened = run_traced(["sh", "-c", script])
    assert status == 3 and f"{tmp_path}/folder/../link" in opened
    assert not any(name.endswith("missing") for name in opened)


def test_without_strace_the_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt-get install strace"):
        run_traced(["true"])
