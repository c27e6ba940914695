"""The faults of tests/faults/mutations.yaml still apply, and the tool finds which are caught."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import command
from tests.faults.command import TABLE, Mutation, covering_tests, packages, plant, read_table

ROOT = Path(__file__).parents[3]
SOURCE = """
def halves(number):
    return number // 2, number - number // 2

class Counter:
    def add(self, number):
        assert number > 0
        self.total = number
"""
ENTRIES = """
base:
  - {symbol: Counter.add, replace: "number > 0", by: "number >= 0", fault: caught,
     tests: [test_it.py]}
  - {symbol: halves, replace: "number - number", by: "number + 0 - number", fault: none,
     tests: ["test_it.py::test_halves"], survives: means the same}
  - {symbol: Counter.add, replace: "= number", by: "= -number", fault: not seen,
     tests: ["test_it.py::test_halves"]}
"""
TESTS = """
import pytest
from megatron_r1.base.files import numbers

def test_halves():
    assert numbers.halves(3) == (1, 2)

def test_add():
    with pytest.raises(AssertionError):
        numbers.Counter().add(0)
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree with three faults."""
    content = {
        "megatron_r1/__init__.py": "",
        "megatron_r1/base/files/__init__.py": "",
        "megatron_r1/base/files/numbers.py": SOURCE,
        "grading/r1_grading/__init__.py": "",
        "kernels/r1_kernels/__init__.py": "",
        "tests/unit/test_it.py": TESTS,
        str(TABLE): ENTRIES,
        ".gitignore": "build/\n",
    }
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def entry(**changes):
    fields = {"package": "base", "symbol": "halves", "replace": "number - number", "by": "number"}
    return Mutation(**fields | {"fault": "", "tests": ("test_it.py",)} | changes)


def apply(mutation, root):
    plant(mutation, root)
    covering_tests(mutation, root)


@pytest.mark.more
def test_every_fault_applies_and_every_package_has_some():
    table = read_table(ROOT)
    for mutation in table:
        apply(mutation, ROOT)  # raises an error that names the entry
    counts = Counter(mutation.package for mutation in table)
    assert set(packages(ROOT)) <= set(counts) and len(table) >= 40
    assert max(Counter(mutation.name for mutation in table).values()) == 1


def test_only_the_text_within_the_symbol_is_replaced(tree):
    mutant = plant(entry(symbol="Counter.add", replace="= number", by="= -number"), tree)
    assert mutant.path == Path("megatron_r1/base/files/numbers.py")
    assert mutant.after == SOURCE.replace("self.total = number", "self.total = -number")


@pytest.mark.parametrize(
    "changes",
    [
        {"symbol": "thirds"},
        {"symbol": "Counter.add", "replace": "number // 2"},
        {"replace": "number // 2"},  # twice
        {"by": "number -"},
        {"by": "number  -  number"},  # means the same
        {"tests": ("test_other.py",)},
        {"tests": ("test_it.py::test_thirds",)},
    ],
)
def test_an_entry_that_does_not_apply_is_named(tree, changes):
    mutation = entry(**changes)
    with pytest.raises(ValueError, match=f"base: {mutation.symbol}: "):
        apply(mutation, tree)


@pytest.mark.more
def test_faults_are_planted_in_a_copy_and_an_interrupted_run_goes_on(tree, monkeypatch, capsys):
    monkeypatch.setattr(command, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["faults", "--jobs", "1"])
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "test_it.py::test_add" in printed and printed.endswith("1 of 3 caught (33%)\n")
    assert (tree / "megatron_r1/base/files/numbers.py").read_text() == SOURCE

    first, *others = (tree / command.RESULTS).read_text().splitlines()
    assert len(others) == 2
    (tree / command.RESULTS).write_text(first + "\n")
    test = tree / "tests/unit/test_it.py"
    test.write_text(
        TESTS.replace("    with", "    assert numbers.Counter().add(1) is None\n    with")
    )
    monkeypatch.setattr(sys, "argv", ["faults", "--jobs", "2", "--only", "= -number"])
    assert command.main() == 1
    assert capsys.readouterr().out.endswith("0 of 1 caught (0%)\n")


def test_tests_that_fail_without_a_fault_catch_none(tree, monkeypatch, capsys):
    (tree / "tests/unit/test_it.py").write_text(TESTS + "    assert False\n")
    monkeypatch.setattr(command, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["faults", "--only", "number >= 0"])
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "NOT PLANTED" in printed and printed.endswith("0 of 1 caught (0%)\n")
    assert not (tree / command.RESULTS).exists()


def test_an_endless_loop_counts_as_caught(tree):
    copy = command.TreeCopy(tree)
    copy.write(Path("megatron_r1/base/files/numbers.py"), "while True: pass")
    assert command.failure_of(*copy.run(["tests/unit/test_it.py"], limit="1")) is not None
    copy.close()
    assert not copy.folder.exists()
