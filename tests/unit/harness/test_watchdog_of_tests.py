"""A hanging test fails by itself, however it hangs; the tests after it still run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_servers import PROCESSES

HARNESS = Path(__file__).parents[2] / "harness"
HANGING = """
import asyncio, subprocess, threading

def test_waits_for_a_lock():
    lock = threading.Lock(); lock.acquire(); lock.acquire()

def test_waits_for_a_child():
    subprocess.run(["sleep", "1000"])

def test_waits_in_an_event_loop():
    async def body():
        try:
            await asyncio.Event().wait()
        except Exception:
            pass
    asyncio.run(body())

def test_computes(computing=3.0):
    import time
    end = time.process_time() + computing
    while time.process_time() < end:
        pass
"""


@pytest.mark.more
def test_what_waits_for_ever_fails_and_what_computes_does_not(tmp_path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "conftest.py").write_text(
        "import watchdog\nfrom watchdog import pytest_runtest_protocol\n"
        "watchdog.WINDOW_SECONDS = 0.5\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        # Without the fork servers of this run, in which other tests compute.
        env=os.environ | {"R1_TEST_IDLE_SECONDS": "2", "PYTHONPATH": str(HARNESS), PROCESSES: ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Hung") >= 3
