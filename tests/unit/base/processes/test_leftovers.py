"""What killed processes leave behind: shared memory, found by their mappings, and folders."""

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from megatron_r1.base.processes.scratch import Scratch, remove_scratch, shared_files

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


def test_only_shared_memory_of_this_users_folders_is_deleted(tmp_path, monkeypatch):
    folder, precious = tmp_path / "r1_made_by_others", tmp_path / "precious"
    folder.mkdir()
    precious.touch()
    (folder / ".r1_owner").write_text(f"{precious}\n/dev/shm/../{precious}\n")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    remove_scratch(folder)
    assert folder.exists()
    monkeypatch.undo()
    remove_scratch(folder)
    assert precious.exists() and not folder.exists()


OWNER = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from megatron_r1.base.processes.scratch import Scratch
memory, scratch = SharedMemory(create=True, size=4096), Scratch()
scratch.add_shared([Path("/dev/shm", memory.name)])
print(memory.name, scratch.name, flush=True)
time.sleep(10_000)
"""


def test_the_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    users = tmp_path / "r1_zero_ppo"
    (users / "hf").mkdir(parents=True)
    # A session of its own, with the resource tracker, which would delete the shared memory.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for _ in range(2)
    ]
    try:
        (memory, folder), (memory_2, folder_2) = (p.stdout.readline().split() for p in processes)
        os.killpg(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        assert Path(folder).exists() and Path("/dev/shm", memory).exists()
        with Scratch() as own:
            assert {path.name for path in tmp_path.iterdir()} == {
                *(Path(own).name, Path(folder_2).name, users.name)
            }
        assert not Path(own).exists()
        assert not Path("/dev/shm", memory).exists() and Path("/dev/shm", memory_2).exists()
        for path in (users, Path(folder_2)):
            remove_scratch(path)
        assert (users / "hf").exists() and not Path("/dev/shm", memory_2).exists()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
