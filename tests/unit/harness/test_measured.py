"""What `tests/harness/measured.py` says of a command: what it took, and what it left behind."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from liveness import is_alive

HARNESS = Path(__file__).parents[2] / "harness"
RUN = "import sys, measured; {}\nsys.exit(measured.main(sys.argv[1:]))"


def measure(folder: Path, script: str, setting: str = "") -> tuple[int, str]:
    path = os.pathsep.join([str(HARNESS), str(HARNESS.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(setting), "sh", "-c", script],
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_is_the_command_s_and_orphans_count(tmp_path, status):
    # The loop is the child of a shell that has ended before.
    loop = f"{shlex.quote(sys.executable)} -c 'for n in range(3 * 10**6): pass'"
    code, output = measure(tmp_path, f'(sh -c "{loop} &"); exit {status}')
    assert code == status and "nothing is left behind" in output
    [seconds] = re.findall(r"^(\d+) CPU seconds", output, re.M)
    assert int(seconds) >= 0


def test_what_is_left_is_named_and_ended(tmp_path):
    listener = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); time.sleep(1000)"
    shared = f"/dev/shm/{tmp_path.name}_{os.getpid()}"
    python = shlex.quote(sys.executable)
    script = f'touch "$TMPDIR/file" {shared}; {python} -c "{listener}" & echo "pid $!"; sleep 1'
    try:
        code, output = measure(tmp_path, script, "measured.END_SECONDS = 0.5")
    finally:
        Path(shared).unlink()
    [pid] = map(int, re.findall(r"^pid (\d+)", output, re.M))
    assert code == 1
    assert f"process {pid}: " in output and f"of process {pid}\n" in output
    assert f"shared memory {shared}" in output and re.search(r"temporary file \S+/file", output)
    assert not is_alive(pid)


def test_what_computes_for_ever_is_left_too(tmp_path):
    loop = f"{shlex.quote(sys.executable)} -c 'while True: pass'"
    code, output = measure(tmp_path, f'{loop} & echo "pid $!"', "measured.END_CPU_SECONDS = 0.5")
    [pid] = map(int, re.findall(r"^pid (\d+)", output, re.M))
    assert code == 1 and f"process {pid}: " in output
    assert not is_alive(pid)
