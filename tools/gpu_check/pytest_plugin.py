"""Writes what the tests of a check measure, and how they end, as soon as either is known: to the
file that GPU_CHECK_RESULT names."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.base.files import atomic_write

RESULT, FOLDER, DEADLINE = "GPU_CHECK_RESULT", "GPU_CHECK_FOLDER", "GPU_CHECK_DEADLINE"
"""Environment variables: the file of the result, the folder of runs, and when the check will be
stopped, as `time.time()`."""

result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "reasons": [], "figures": {}}


def pytest_configure() -> None:
    """Let SIGTERM end the tests as an exception, which ends what they have started."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pytest.exit("its time is over", returncode=128 + number)


def _write() -> None:
    if file := os.environ.get(RESULT):
        atomic_write(Path(file), json.dumps(result))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test, with the reason where it failed or was skipped."""
    if report.when != "call" and report.passed:
        return
    result[report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        result["reasons"].append(crash.message.splitlines()[0] if crash else str(report.longrepr))
    elif report.skipped and isinstance(report.longrepr, tuple):
        result["reasons"].append(report.longrepr[2].removeprefix("Skipped: "))
    _write()


@pytest.fixture
def record_figures() -> Callable[[Mapping[str, Any]], None]:
    """A function that adds figures, by name, to the result."""

    def record(figures: Mapping[str, Any]) -> None:
        result["figures"] |= {key: value for key, value in figures.items() if value is not None}
        _write()

    return record


@pytest.fixture
def check_folder(tmp_path: Path) -> Path:
    """The folder of a check's runs, with a short name, as paths of sockets have 107 bytes."""
    folder = Path(os.environ.get(FOLDER, tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def seconds_left() -> Callable[[], float]:
    """A function that returns the seconds until the check is stopped."""
    return lambda: float(os.environ.get(DEADLINE, "inf")) - time.time()
