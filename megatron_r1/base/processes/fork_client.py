"""Child processes whose imports are made once: forked from a process that has made them.

`start` does for a module what `children.start` does for `python -m MODULE`; `fork_server` is the
other side. Importing vLLM's server takes four seconds of CPU and reads thousands of files. Several
engines on a host, and an engine that replaces another, share one import; after `preload` it runs
while this process does what it must before it needs the first engine.

With `SERVERS` set, processes come from fork servers that outlive this process, and where the folder
has none from new interpreters."""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_r1.base.processes import children
from megatron_r1.base.processes.fork_server import SERVERS, ForkReply, Request
from megatron_r1.base.processes.scratch import Scratch

POLL_SECONDS = 0.02
_SERVER = [sys.executable, "-m", "megatron_r1.base.processes.fork_server"]


class ForkedProcess:
    """A process that a fork server starts, with the methods of `subprocess.Popen` that `children`
    uses. It ends with the server, and with this process; its process group ends with it.

    Attributes:
        returncode: the exit status as Popen has it, None until the end was noticed."""

    def __init__(
        self, connection: socket.socket, server: "ForkServerProcess | None", log: Path
    ) -> None:
        connection.setblocking(False)
        self._connection, self._server, self._log = connection, server, log
        self._pid = 0
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 while the server imports, and for a process that ended in that time."""
        self.poll()
        return self._pid

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that ended the process; None
        while it runs."""
        while self.returncode is None:
            try:
                message = self._connection.recv(64)
            except BlockingIOError:
                return None
            except ConnectionError:
                message = b""
            if message:
                self._pid, self.returncode = msgspec.msgpack.decode(message, type=ForkReply)
            elif self._pid or self._server is None:
                self.returncode = -signal.SIGKILL  # the kernel's, at the end of the server
            else:
                self.returncode = self._server.describe_end(self._log)
            if self.returncode is not None:
                if message:  # until the connection is closed, the number is not another's
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._pid, signal.SIGKILL)
                self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return what `poll` does at the process's end.

        Raises:
            subprocess.TimeoutExpired: the process has not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self._pid}", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return code

    def terminate(self) -> None:
        """Send SIGTERM; cancel a start for which the server has not made its imports."""
        if self.poll() is not None:
            return
        if self._pid:
            os.kill(self._pid, signal.SIGTERM)
        else:
            self._connection.close()
            self.returncode = -signal.SIGTERM


class ForkServerProcess:
    """A fork server that ends with this process, and with the thread that creates it."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._owner = os.getpid()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        # Some packages make temporary folders when they are imported, W&B for example.
        self._scratch = Scratch()
        self._channel, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            self._process = subprocess.Popen(
                [*_SERVER, module, str(server_end.fileno())],
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[server_end.fileno()],
                **_server_options({**environment, "TMPDIR": self._scratch.name}),
            )

    @property
    def is_usable(self) -> bool:
        """Whether it runs, as a child of this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def connect(self) -> socket.socket:
        """Return a new connection.

        Raises:
            OSError: the server has ended.
        """
        client_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            socket.send_fds(self._channel, [b"."], [server_end.fileno()])
        return client_end

    def describe_end(self, log: Path) -> int:
        """Append what the ended server has printed to `log`; return its exit code, never 0."""
        code = self._process.wait()
        self._output.seek(0)
        with open(log, "ab") as file:
            file.write(self._output.read())
        return code or 1

    def close(self) -> None:
        """End the server, and with it the processes that it has started."""
        if self._owner == os.getpid():
            self._channel.close()
            children.kill(self._process)
            self._output.close()
            self._scratch.cleanup()


_importers: dict[str, ForkServerProcess] = {}


def preload(module: str, environment: Mapping[str, str]) -> None:
    """Begin the imports of `module` in a process of its own, unless they have begun. Does nothing
    where processes are not forked from here.

    Args:
        module: the module that the process runs.
        environment: variables over this process's, as later in `start`.
    """
    if os.environ.get(SERVERS) or not _can_fork():
        return
    if module not in _importers or not _importers[module].is_usable:
        _importers[module] = ForkServerProcess(module, environment)


def start(
    module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> ForkedProcess | subprocess.Popen[bytes]:
    """Start `module` with its output appended to `log`, as `children.start` starts a command, and
    return at once. Call it from a thread that lives as long as the process should.

    Args:
        module: as in `preload`.
        arguments: the module's command line.
        log: the file that its output is appended to.
        environment: as in `preload`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    importer = None
    try:
        if folder := os.environ.get(SERVERS):
            connection = _connect_socket(Path(folder, module))
        elif _can_fork():
            preload(module, environment)
            importer = _importers[module]
            connection = importer.connect()
        else:
            raise OSError("nothing is forked here")
    except OSError:
        return children.start([sys.executable, "-m", module, *arguments], log, environment)
    request = Request(list(arguments), {**os.environ, **environment}, os.getcwd(), _current_umask())
    with open(log, "ab") as output, contextlib.suppress(ConnectionError):  # `poll` finds the end
        socket.send_fds(connection, [msgspec.msgpack.encode(request)], [output.fileno()])
    return ForkedProcess(connection, importer, log)


@atexit.register
def close() -> None:
    """End the fork servers of this process, and with them what they have started."""
    for importer in _importers.values():
        importer.close()
    _importers.clear()


def _server_options(environment: Mapping[str, str]) -> dict[str, Any]:
    # NumPy's OpenBLAS then starts no threads: a process that has several is not safe to fork.
    return children.popen_options({"OPENBLAS_NUM_THREADS": "1", **environment})


def _can_fork() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return hasattr(os, "pidfd_open") and is_main


def _connect_socket(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _current_umask() -> int:
    """Return this process's umask. `os.umask` would set it, for all threads."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
