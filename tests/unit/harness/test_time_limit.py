"""The limit of time of a test run, in runs of pytest with one and with two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "harness"
PYTEST = [sys.executable, "-m", "pytest", "-p", "time_limit", "-p", "no:cacheprovider", "-rs", "-v"]


@pytest.fixture
def files(tmp_path):
    """A folder of four files with two tests each, whose fixture leaves a file."""
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(
            "import pathlib, pytest\n"
            "@pytest.fixture(scope='module')\n"
            "def made():\n"
            "    pathlib.Path(__file__).with_suffix('.made').touch()\n"
            "def test_one(made): pass\n"
            "def test_two(made): pass\n"
        )
    return tmp_path


def run(folder, *options, **environment):
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("R1_TEST_")}
    return subprocess.run(
        [*PYTEST, *options, "."],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(HARNESS), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadfile"]])
def test_what_would_begin_too_late_is_skipped_before_its_fixtures(files, workers):
    output = run(files, *workers, R1_TEST_MINUTES="0")
    assert "8 skipped" in output
    assert "the run's 0 minutes are over" in output
    assert not list(files.glob("*.made"))


def test_all_run_within_the_limit_and_without_one(files):
    assert "8 passed" in run(files, R1_TEST_MINUTES="60")
    assert "8 passed" in run(files)


def test_the_order_of_files_changes_from_day_to_day(files):
    def order(day):
        output = run(files, R1_TEST_MINUTES="1e9", R1_TEST_BEGUN=str(86_400 * day))
        return [line.split("::")[0] for line in output.splitlines() if "::test_one" in line]

    orders = [order(day) for day in range(4)]
    assert all(sorted(each) == [f"test_{name}.py" for name in "abcd"] for each in orders)
    assert len({tuple(each) for each in orders}) > 1
