"""The peak of a command's memory, against an allocation of known size."""

import subprocess
import sys

from waiting import wait_until

from megatron_r1.base.processes.host_memory import PeakMemory

# Writes 200 MiB, which a forked child shares; both hold it until the input ends.
PARENT_AND_CHILD = """
import os, sys
held = b"x" * (200 << 20)
child = os.fork()
if child:
    print("held", flush=True)
sys.stdin.read()
if child:
    os.wait()
"""


def test_the_peak_remains_when_all_has_ended_and_shared_pages_count_once():
    command, pipe = [sys.executable, "-c", PARENT_AND_CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        # Before it runs the program, a child has the memory of the tests' own process.
        process.stdout.readline()
        with PeakMemory(every_seconds=0.02) as peak:
            wait_until(lambda: peak.gib >= 200 / 1024)
            process.communicate()
    assert 200 <= peak.gib * 1024 < 300
