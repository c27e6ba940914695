"""Imports a module once and forks the processes that run it (Linux).

    python -m megatron_r1.base.processes.fork_server MODULE CHANNEL

`fork_client` is the other side. CHANNEL is a Unix socket: an inherited descriptor over which the
parent passes connections, or a path at which processes connect while standard input is open. Each
connection starts one process. Its request comes with the descriptor of the log; the replies are the
process id, and the status once the process has ended. The ended process stays a zombie until the
connection is closed; a running one is then killed, with its process group.

MODULE has `preload()`, which imports what takes long, `main()`, and `VARIABLES_READ_AFTER_IMPORT`:
the names of the environment variables that nothing reads before `main`. A request in which another
variable has another value, or that comes when a fork would not be safe, starts a new interpreter
instead."""

import contextlib
import importlib
import os
import selectors
import signal
import socket
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from megatron_r1.base.processes import children, timeline
from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.base.processes.scratch import remove_scratch, shared_files

MAX_REQUEST_BYTES = 1 << 20
SERVERS = "MEGATRON_R1_FORK_SERVERS"
"""Environment variable: a folder with the sockets of running fork servers, named by module."""
OWN_VARIABLES = {children.PARENT, SERVERS, "OPENBLAS_NUM_THREADS", "TMPDIR"}
"""Variables that may differ for every module."""


class Request(NamedTuple):
    """A request to run a module in a forked process.

    Attributes:
        environment: its environment variables.
        arguments: the module's arguments.
        folder: the working directory.
        umask: the umask of the process that asks, so that its choice of who may read its files
            holds for those of the new one."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    umask: int


class ForkReply(NamedTuple):
    """The server's message that a process has started or ended.

    Attributes:
        pid: the process's id.
        status: the exit code, or minus the number of the signal that ended it; None while it runs.
    """

    pid: int
    status: int | None = None


class ForkedChild:
    """A process that was started, and the connection that asked for it."""

    def __init__(self, pid: int, connection: socket.socket, temporary: str) -> None:
        """Take up a process that was forked.

        Args:
            pid: the process's id.
            connection: the connection that asked for the process.
            temporary: the process's folder for temporary files."""
        self.pid, self.connection, self._temporary = pid, connection, Path(temporary)
        self.end = os.pidfd_open(pid)
        """Becomes readable when the process ends."""
        self.is_wanted = True
        """Whether the connection is open."""

    def kill(self) -> None:
        """Kill its process group, and delete what that leaves in shared memory and in its temporary
        folder. The process that would do so may have been killed itself."""
        shared_paths = shared_files(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # One that has just been forked has no group yet. Its id is its own until it is waited for.
        os.kill(self.pid, signal.SIGKILL)
        for path in shared_paths:
            path.unlink(missing_ok=True)
        remove_scratch(self._temporary)


class ForkServer:
    """Starts a process for each connection, and reports its end."""

    def __init__(self, channel: socket.socket, module: str) -> None:
        """Prepare the server; `wait_for_request` starts processes.

        Args:
            channel: the socket from which connections are accepted if it listens, else the socket
                over which they are received.
            module: the name of the module that the processes run."""
        self._channel, self._module = channel, module
        self._environment = dict(os.environ)
        """As it was when the imports began, which may change it."""
        self._may_differ = set(OWN_VARIABLES)
        self._children: set[ForkedChild] = set()
        self._selector = selectors.DefaultSelector()
        # Not by the channel alone, which another process may have inherited.
        self._selector.register(os.pidfd_open(os.getppid()), selectors.EVENT_READ, self.end)

    def wait_for_request(self, read_late: Collection[str]) -> list[str]:
        """Start processes until the channel or standard input is closed or the parent has ended,
        which ends them and this process. Returns the arguments, in each forked process."""
        self._may_differ |= set(read_late)
        listens = bool(self._channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        receive = self._accept_channel if listens else self._receive_connection
        self._selector.register(self._channel, selectors.EVENT_READ, receive)
        if listens:
            self._selector.register(0, selectors.EVENT_READ, self.end)
        while True:
            for key, _ in self._selector.select():
                if isinstance(key.data, ForkedChild):
                    self._follow_child(key.data, has_ended=key.fd == key.data.end)
                elif key.data is not None:
                    key.data()
                else:
                    assert isinstance(key.fileobj, socket.socket), "a connection"
                    if (arguments := self._start_child(key.fileobj)) is not None:
                        return arguments

    def _accept_channel(self) -> None:
        self._selector.register(self._channel.accept()[0], selectors.EVENT_READ)

    def _receive_connection(self) -> None:
        connection = self._next_connection()
        if connection is None:
            self.end()
        self._selector.register(connection, selectors.EVENT_READ)

    def _next_connection(self) -> socket.socket | None:
        """Return a connection that came over the channel, or None where that is closed."""
        _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    def end(self, *_signal: object) -> NoReturn:
        """End this process and its children, and delete the temporary folders of all, started or
        not."""
        for child in self._children:
            child.kill()
        self._channel.setblocking(False)
        with contextlib.suppress(OSError):
            while connection := self._next_connection():
                payload, _, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
                if payload:
                    request = msgspec.msgpack.decode(payload, type=Request)
                    remove_scratch(Path(request.environment.get("TMPDIR", "")))
        remove_scratch(Path(tempfile.gettempdir()))
        os._exit(0)

    def _start_child(self, connection: socket.socket) -> list[str] | None:
        """Start the process that a connection asks for. Returns its arguments in that process."""
        self._selector.unregister(connection)
        payload, descriptors = b"", list[int]()
        with contextlib.suppress(ConnectionError):
            flags = socket.MSG_CMSG_CLOEXEC
            payload, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1, flags)
        if not payload:  # closed again
            connection.close()
            return None
        request = msgspec.msgpack.decode(payload, type=Request)
        may_fork = self._may_fork(request.environment)
        request.environment[children.PARENT] = str(os.getpid())
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._become_child(descriptors[0], request)
            if not may_fork:
                command = [sys.executable, "-m", self._module, *request.arguments]
                os.execve(sys.executable, command, request.environment)
            return request.arguments
        os.close(descriptors[0])
        child = ForkedChild(pid, connection, request.environment.get("TMPDIR", ""))
        self._children.add(child)
        self._selector.register(child.end, selectors.EVENT_READ, child)
        self._selector.register(connection, selectors.EVENT_READ, child)
        _send_reply(child, ForkReply(pid))
        return None

    def _may_fork(self, environment: Mapping[str, str]) -> bool:
        differing_names = {name for name, _ in environment.items() ^ self._environment.items()}
        # What pytest says of the running test and worker.
        differing_names = {name for name in differing_names if not name.startswith("PYTEST_")}
        return differing_names <= self._may_differ and not _has_threads() and not _has_cuda()

    def _become_child(self, log: int, request: Request) -> None:
        """Make this forked process like one that `children.start` has started."""
        children.die_with_parent()
        os.setsid()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif key.fd != 0:
                os.close(key.fd)
        self._selector.close()
        with contextlib.suppress(OSError):  # what the imports have printed, if it is in a file
            os.write(log, os.pread(1, os.fstat(1).st_size, 0))
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, standard_fd in ((null, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, standard_fd)
        os.close(null)
        os.close(log)
        os.chdir(request.folder)
        os.umask(request.umask)
        for name in self._environment.keys() - request.environment.keys():
            os.environ.pop(name, None)
        for name, value in request.environment.items() - self._environment.items():
            os.environ[name] = value
        tempfile.tempdir = None  # found anew from TMPDIR
        if "numpy" in sys.modules:  # Python's own generator is seeded at a fork
            sys.modules["numpy"].random.seed()

    def _follow_child(self, child: ForkedChild, has_ended: bool) -> None:
        """Report a child's end; end the child whose connection has been closed."""
        if has_ended:
            self._selector.unregister(child.end)
            end = os.waitid(os.P_PIDFD, child.end, os.WEXITED | os.WNOWAIT)
            os.close(child.end)
            child.end = -1
            assert end is not None, "it waits"
            has_exited = end.si_code == os.CLD_EXITED
            _send_reply(
                child, ForkReply(child.pid, end.si_status if has_exited else -end.si_status)
            )
        else:
            self._selector.unregister(child.connection)
            child.connection.close()
            child.is_wanted = False
            child.kill()
        if child.end < 0 and not child.is_wanted:
            self._children.remove(child)
            os.waitpid(child.pid, 0)


def _send_reply(child: ForkedChild, reply: ForkReply) -> None:
    if child.is_wanted:
        with contextlib.suppress(ConnectionError):  # that it is closed is seen next
            child.connection.send(msgspec.msgpack.encode(reply))


def _has_threads() -> bool:
    """Return whether this process has a second thread, of Python or of a library. A lock that it
    holds during a fork stays locked in the child for ever."""
    return len(os.listdir("/proc/self/task")) > 1


def _has_cuda() -> bool:
    """Return whether CUDA is initialized in this process, whose forked children cannot use it."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == "/dev/nvidia-uvm":
                return True
    return False


def _open_channel(name: str) -> socket.socket:
    """Return the inherited socket with this number, or a socket that listens at this path."""
    if name.isdigit():
        return socket.socket(fileno=int(name))
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.bind(f"{name}.new")
    channel.listen()  # connections wait until the imports have been made
    os.rename(f"{name}.new", name)
    return channel


def main() -> None:
    """Import the module, start processes, and be each of them."""
    children.end_without_parent()
    name = sys.argv[1]
    server = ForkServer(_open_channel(sys.argv[2]), name)
    signal.signal(signal.SIGTERM, server.end)
    children.die_with_parent(signal.SIGTERM)
    set_title = _title_setter()
    module = importlib.import_module(name)
    with without_garbage_collection():
        module.preload()
    timeline.mark(f"fork server of {name}/imports made")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    children.die_with_parent(0)  # from now on `ForkServer` sees that end
    arguments = server.wait_for_request(module.VARIABLES_READ_AFTER_IMPORT)
    children.end_without_parent()
    set_title(" ".join([sys.executable, "-m", name, *arguments]))
    sys.argv = [str(module.__file__), *arguments]
    module.main()


def _title_setter():
    """Return what sets the command line that `ps` shows; vLLM installs it."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return lambda title: None
    return setproctitle


if __name__ == "__main__":
    main()
