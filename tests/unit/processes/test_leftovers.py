"""Shared memory that processes leave behind, found by their mappings."""

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory

from megatron_r1.processes.leftovers import shared_files

HOLDER = """
import subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
if len(sys.argv) > 1:
    held = SharedMemory(sys.argv[1])
    print("mapped", flush=True)
    time.sleep(10_000)
subprocess.run([sys.executable, __file__, NAME])
"""


def test_memory_that_a_process_below_has_mapped_is_found_until_it_is_gone(tmp_path):
    memory, beside = (SharedMemory(create=True, size=4096) for _ in range(2))
    (tmp_path / "holder.py").write_text(HOLDER.replace("NAME", repr(memory.name)))
    command = [sys.executable, tmp_path / "holder.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        assert [path.name for path in shared_files(process.pid)] == [memory.name]
        memory.unlink()
        assert shared_files(process.pid) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        beside.unlink()
