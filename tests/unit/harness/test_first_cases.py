"""`@pytest.mark.first_cases`, in runs of pytest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "harness"
CONFTEST = """
import pytest
from first_cases import mark_later_cases
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_later_cases(items)
"""
TEST = """
import pytest
@pytest.mark.first_cases(2)
@pytest.mark.parametrize("case", range(5))
def test_cases(case): pass
def test_alone(): pass
"""


@pytest.mark.parametrize("chosen", ["not more", "more"])
def test_cases_after_the_first_are_more(tmp_path, chosen):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HARNESS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed, 3 deselected" in done.stdout, done.stdout + done.stderr
