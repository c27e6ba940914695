"""Begins no test after R1_TEST_MINUTES of a run; those that are left are skipped with that reason.

For continuous integration, which ends at a fixed time: a slow machine runs fewer tests and says how
many. The order of the files is then another one each day, so that it is not always the same tests
that are left."""

import os
import random
import time
from datetime import UTC, datetime

import pytest

MINUTES = "R1_TEST_MINUTES"
BEGUN = "R1_TEST_BEGUN"
"""Environment variable for the workers of a run: when it began, seconds since 1970."""


def pytest_configure() -> None:
    """Set when the run began, before workers start, which inherit the environment."""
    os.environ.setdefault(BEGUN, str(time.time()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by the day on which the run began."""
    if os.environ.get(MINUTES):
        day = datetime.fromtimestamp(float(os.environ[BEGUN]), UTC).toordinal()
        files = sorted({str(item.path) for item in items})
        random.Random(day).shuffle(files)
        place = {file: index for index, file in enumerate(files)}
        items.sort(key=lambda item: place[str(item.path)])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip a test that would begin too late, before its fixtures are made."""
    minutes = os.environ.get(MINUTES)
    if minutes and time.time() - float(os.environ[BEGUN]) > 60 * float(minutes):
        pytest.skip(f"the run's {minutes} minutes are over")
