"""Processes forked from a server that has imported their module: what a parent sees of them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fork_servers import shared_server
from liveness import is_alive
from waiting import PATIENT, wait_until

from megatron_r1.base.processes import children, fork_client
from megatron_r1.base.processes.fork_server import ForkedChild

HERE = Path(__file__).parent
MODULE = "forked_module"
EARLY = {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "EARLY": "1"}


@pytest.fixture(autouse=True)
def _servers(monkeypatch):
    monkeypatch.delenv(fork_client.SERVERS, raising=False)
    yield
    fork_client.close()


def start(log, *arguments, **environment):
    return fork_client.start(MODULE, list(arguments), log, EARLY | environment)


def facts(log) -> list[str]:
    """What `forked_module` has printed of itself: origin, LATE, EARLY, temporary and own folder."""
    wait_until(lambda: log.read_text().count("\n") > 1)
    return log.read_text().splitlines()[1].split("\t")


def test_exit_codes_and_signals_are_reported(tmp_path):
    ends = {("exit", "0"): 0, ("exit", "3"): 3, ("signal", "9"): -9, ("signal", "15"): -15}
    started = {how: start(tmp_path / "_".join(how), *how) for how in ends}
    assert {how: process.wait() for how, process in started.items()} == ends
    assert {facts(tmp_path / "_".join(how))[0] for how in ends} == {"forked"}


def test_a_forked_process_has_its_own_log_environment_folders_and_session(tmp_path, monkeypatch):
    before = Path.cwd()
    first = start(tmp_path / "first", "sleep", LATE="a", TMPDIR=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    second = start(tmp_path / "deep" / "second", "sleep", LATE="b")
    assert facts(tmp_path / "first") == ["forked", "a", "1", str(tmp_path), str(before)]
    assert facts(tmp_path / "deep" / "second")[:3] == ["forked", "b", "1"]
    for process in (first, second):
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid


def test_a_process_that_has_no_session_of_its_own_yet_is_killed(tmp_path):
    """As one is whose start was given up at once, for a time limit for example."""
    sleeping = subprocess.Popen(["sleep", "1000"])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ForkedChild(sleeping.pid, theirs, str(tmp_path / "none")).kill()
    assert sleeping.wait() == -signal.SIGKILL


@pytest.mark.parametrize("other", [{"EARLY": "2"}, {"NEW": "1"}])
def test_another_environment_starts_a_new_interpreter(tmp_path, other):
    fork_client.preload(MODULE, EARLY)
    process = start(tmp_path / "log", "exit", "4", **other)
    assert process.wait() == 4
    assert facts(tmp_path / "log")[:3] == ["fresh", "None", other.get("EARLY", "1")]


def test_a_thread_in_the_server_means_a_new_interpreter(tmp_path):
    process = start(tmp_path / "log", "exit", "4", THREAD="1")
    assert process.wait() == 4
    assert facts(tmp_path / "log")[0] == "fresh"


def test_imports_that_fail_end_the_process_and_are_in_its_log(tmp_path):
    process = start(tmp_path / "log", "exit", "0", FAIL="1")
    assert process.wait() == 1
    assert "no such library" in (tmp_path / "log").read_text()
    assert start(tmp_path / "log", "exit", "0").wait() == 0, "the next start is a new server's"


def test_stop_ends_the_whole_group(tmp_path):
    process = start(tmp_path / "log", "child")
    wait_until(lambda: len(printed(tmp_path / "log")) == 2)
    children.stop(process, timeout_seconds=PATIENT)  # it ends at once, its child does not
    assert process.returncode == -signal.SIGTERM
    wait_until(lambda: not any(map(is_alive, printed(tmp_path / "log"))))


def printed(log) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line[:3] == "pid"]


def shared_names(log) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines() if line[:6] == "shared"]


def test_a_server_that_still_imports_leaves_nothing_of_its_killed_controller(
    tmp_path, short_folder
):
    environment = EARLY | {"IMPORT_FOR_EVER": str(tmp_path / "imports")}
    program = CONTROLLER.replace(repr(EARLY), repr(environment))
    own = {fork_client.SERVERS: "", "TMPDIR": str(short_folder)}
    controller = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")], env={**os.environ, **own}
    )
    wait_until(lambda: (tmp_path / "imports").exists() and (tmp_path / "log.asked").exists())
    server = int((tmp_path / "imports").read_text())
    controller.kill()
    controller.wait()
    wait_until(lambda: not is_alive(server))
    assert not list(short_folder.glob("r1_*"))


def test_a_start_is_cancelled_while_the_server_imports(tmp_path):
    process = start(tmp_path / "log", "sleep")
    children.stop(process)
    assert process.returncode is not None and not printed(tmp_path / "log")


def test_a_folder_without_servers_means_new_interpreters(tmp_path, monkeypatch):
    monkeypatch.setenv(fork_client.SERVERS, str(tmp_path))
    fork_client.preload(MODULE, EARLY)
    process = start(tmp_path / "log", "exit", "4")
    assert isinstance(process, subprocess.Popen) and process.wait() == 4


CONTROLLER = f"""
import sys, time
from pathlib import Path
from megatron_r1.base.processes import fork_client
from megatron_r1.base.processes.scratch import Scratch
scratch = Scratch()
arguments = ["child", "memory"]
environment = {EARLY!r} | {{"TMPDIR": scratch.name}}
process = fork_client.start({MODULE!r}, arguments, Path(sys.argv[1]), environment)
Path(sys.argv[1] + ".asked").touch()
time.sleep(1e6)
"""


@pytest.mark.parametrize("shared", [False, True])
def test_a_forked_process_ends_with_its_killed_controller_and_leaves_nothing(
    tmp_path, short_folder, shared
):
    with shared_server(MODULE, short_folder, EARLY) as server:
        servers = str(short_folder) if shared else ""
        own = {fork_client.SERVERS: servers, "TMPDIR": str(short_folder)}
        command = [sys.executable, "-c", CONTROLLER, str(tmp_path / "log")]
        controller = subprocess.Popen(command, env={**os.environ, **own})
        wait_until((tmp_path / "log").exists)
        wait_until(lambda: len(shared_names(tmp_path / "log")) == 2)
        controller.kill()
        controller.wait()
        wait_until(lambda: not any(map(is_alive, printed(tmp_path / "log"))))
        wait_until(lambda: not list(short_folder.glob("r1_*")))
        names = shared_names(tmp_path / "log")
        wait_until(lambda: not any(Path("/dev/shm", name).exists() for name in names))
        assert server.poll() is None, "the shared server goes on"
