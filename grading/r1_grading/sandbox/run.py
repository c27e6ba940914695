"""Run one program once, in a sandbox of its own, and end it at its limits.

bwrap builds the sandbox and then waits for the filter of system calls, which comes through a pipe,
so that a pidfd of the sandbox's process 1, which becomes the program, is open before the program
starts. When process 1 ends, by itself or by SIGKILL, the kernel kills every other process of the
sandbox; bwrap waits for that, and no result is returned before bwrap has ended.

If this process is killed first, the pipe ends without a filter, and bwrap fails. (`--block-fd`
would let the program start then, without a limit on its time: process 1 arranges to die with bwrap,
by `--die-with-parent`, only after that wait, when bwrap may be gone.)

prlimit(1) sets the limits inside the sandbox and then becomes the program: there, `processes`
counts what runs in the sandbox's own user namespace (Linux 5.14), not all processes of the user on
the host."""

import contextlib
import fcntl
import functools
import json
import math
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import psutil

from r1_grading.base.errors import RunError, shorten
from r1_grading.sandbox import requirements
from r1_grading.sandbox.limits import Budget
from r1_grading.sandbox.seccomp import build_filter

SETUP_SECONDS = 20.0
ENDING_SECONDS = 20.0
SIGNALS = {
    6: "aborted",
    7: "bus error",
    8: "arithmetic error, such as a division by zero",
    9: "killed",
    11: "segmentation fault or abort",  # abort() where SIGABRT is ignored, as in process 1
    24: "CPU time limit",
    25: "file size limit",
    31: "forbidden system call",
}

Stopped = Literal["wall time", "output", ""]


class SandboxError(RunError):
    """bubblewrap could not build the sandbox or did not end: the program has no outcome."""


@dataclass(frozen=True)
class ProgramOutcome:
    """The outcome of one run.

    Attributes:
        stdout: the bytes of standard output, cut off at the limit that `stopped` names.
        stderr: the bytes of standard error, cut off at the same limit.
        status: the exit status, or 128 + the signal.
        seconds: wall time of sandbox and program, never less than the CPU time that counts against
            the limit, since the program's process also builds the sandbox.
        stopped: the limit for which the run was killed from outside, or ""."""

    stdout: bytes
    stderr: bytes
    status: int
    seconds: float
    stopped: Stopped


class SandboxProcess:
    """A running bwrap process and the sandbox below it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        status_fd: int,
        filter_file: BinaryIO,
        system_calls: bytes,
        budget: Budget,
        started_at: float,
    ) -> None:
        """Watch a started sandbox.

        Args:
            process: bwrap.
            status_fd: reads bwrap's `--json-status-fd`.
            filter_file: where bwrap waits for the program of its `--seccomp`.
            system_calls: that program, less than a pipe holds.
            budget: the limits of the run.
            started_at: time.monotonic() before bwrap was started."""
        assert process.stdout is not None and process.stderr is not None, "started with pipes"
        self.process, self.budget = process, budget
        self.status_fd = status_fd
        self.filter_file, self.system_calls = filter_file, system_calls
        self.init_pidfd: int | None = None  # of the sandbox's process 1
        self.stdout_fd, self.stderr_fd = process.stdout.fileno(), process.stderr.fileno()
        self.received = {fd: bytearray() for fd in (self.stdout_fd, self.stderr_fd, status_fd)}
        self.started_at = started_at
        self.deadline = started_at + SETUP_SECONDS

    def wait(self) -> ProgramOutcome:
        """Return the outcome of the program, killing it at its limits.

        Raises:
            SandboxError: bubblewrap cannot build a sandbox.
        """
        reached_limit = self._collect_output()
        seconds = time.monotonic() - self.started_at
        self._kill_processes()
        exit_status = self._exit_status()
        stdout, stderr = (bytes(self.received[fd]) for fd in (self.stdout_fd, self.stderr_fd))
        if exit_status is None and (self.init_pidfd is None or not reached_limit):
            message = shorten(stderr.decode("utf-8", "replace"), 300) or "no message"
            raise SandboxError(f"bubblewrap could not build a sandbox: {message}")
        status = 128 + signal.SIGKILL if exit_status is None else exit_status
        return ProgramOutcome(stdout, stderr, status=status, seconds=seconds, stopped=reached_limit)

    def close(self) -> None:
        """Kill the sandbox if it still runs. Safe in any state."""
        try:
            self._kill_processes()
        finally:
            if self.init_pidfd is not None:
                os.close(self.init_pidfd)

    def _collect_output(self) -> Stopped:
        """Read until all pipes are closed. Return the limit that was reached first, or ""."""
        poll = select.poll()
        for fd in self.received:
            poll.register(fd, select.POLLIN)
        num_open = len(self.received)
        while num_open:
            seconds_left = self.deadline - time.monotonic()
            if seconds_left <= 0:
                return "wall time"
            for fd, _ in poll.poll(math.ceil(seconds_left * 1000)):
                chunk = os.read(fd, 65536)
                if not chunk:
                    poll.unregister(fd)
                    num_open -= 1
                self.received[fd] += chunk
                if fd == self.status_fd and self.init_pidfd is None and b"\n" in chunk:
                    self.start_program()
            num_bytes = len(self.received[self.stdout_fd]) + len(self.received[self.stderr_fd])
            if num_bytes > self.budget.output_bytes:
                return "output"
        return ""

    def start_program(self) -> None:
        """Open a pidfd of the sandbox's process 1, then let the program start."""
        pid = json.loads(self.received[self.status_fd].partition(b"\n")[0])["child-pid"]
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # bwrap failed: it writes why, and no exit status follows
        try:
            is_child = psutil.Process(pid).ppid() == self.process.pid
        except psutil.Error:
            is_child = False
        if not is_child:  # bwrap failed, and another process has the number by now
            os.close(pidfd)
            return
        self.init_pidfd = pidfd
        self.deadline = time.monotonic() + self.budget.wall_seconds
        with contextlib.suppress(BrokenPipeError), self.filter_file:
            self.filter_file.write(self.system_calls)

    def _kill_processes(self) -> None:
        """Kill every process of the sandbox that still runs, and wait for the end of all."""
        if self.init_pidfd is None:
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init_pidfd, signal.SIGKILL)
            poller = select.poll()
            poller.register(self.init_pidfd, select.POLLIN)
            if not poller.poll(ENDING_SECONDS * 1000):
                self.process.kill()
                raise SandboxError(f"a sandbox did not end within {ENDING_SECONDS:g} s")
        self.process.wait()

    def _exit_status(self) -> int | None:
        """Return the program's exit status as bwrap reports it; None if it never started."""
        os.set_blocking(self.status_fd, False)
        with contextlib.suppress(BlockingIOError):
            self.received[self.status_fd] += os.read(self.status_fd, 65536)
        for line in bytes(self.received[self.status_fd]).splitlines():
            report = json.loads(line)
            if "exit-code" in report:
                return report["exit-code"]
        return None


def describe_failure(outcome: ProgramOutcome, budget: Budget) -> str:
    """Return which limit the program exceeded or how it crashed; "" if it exited normally."""
    if outcome.stopped == "wall time":
        return f"time limit: stopped after {budget.wall_seconds:.3g} s"
    if outcome.stopped == "output":
        return f"output limit: over {budget.output_bytes / 2**20:g} MiB"
    if outcome.status == 0:
        return ""
    lines = outcome.stderr[-2000:].decode("utf-8", "replace").splitlines()
    message = shorten(next((line for line in reversed(lines) if line.strip()), ""), 160)
    if any(name in message for name in ("MemoryError", "bad_alloc")):
        return f"memory limit of {budget.memory_bytes / 2**20:g} MiB: {message}"
    ending = f"exit status {outcome.status}"
    if outcome.status > 128:
        signal_number = outcome.status - 128
        ending = SIGNALS.get(signal_number, f"signal {signal_number}")
        if signal_number == 9 and outcome.seconds >= budget.cpu_seconds:
            return f"time limit: {budget.cpu_seconds:g} s of CPU"
    return f"runtime error ({ending})" + (f": {message}" if message else "")


NUM_OPEN_FILES = 64
WORK = "/work"
"""The working folder. A program cannot write even there: files in memory do not count against the
limit on address space, and their number cannot be limited."""
PROGRAM_ENVIRONMENT = {
    **{"PATH": "/usr/bin", "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
    # The same answer gets the same reward, even if it depends on the order of a set.
    "PYTHONHASHSEED": "0",
}
NAMESPACES = (
    "--unshare-all",
    "--unshare-user",
    "--uid",
    str(requirements.NOBODY),
    "--gid",
    str(requirements.NOBODY),
    "--hostname",
    "sandbox",
    "--die-with-parent",
    # A session of its own: otherwise TIOCSTI could type into the grader's terminal (CVE-2017-5226).
    "--new-session",
    # The program is process 1 itself: bwrap then waits for it and reaps it. Otherwise every run
    # leaves a zombie in containers whose first process reaps nothing.
    "--as-pid-1",
)
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64")
LIBRARY_LINKS = ("/lib", "/lib32", "/lib64")
COMPILER_FOLDERS = ("/usr/bin", "/usr/include", "/usr/libexec")


def run_command(
    command: Sequence[str],
    budget: Budget,
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes],
    compiler: bool = False,
) -> ProgramOutcome:
    """Run a command in a sandbox, which is gone on return.

    Args:
        command: the command and its arguments.
        budget: the limits of the run.
        stdin: the content of its standard input.
        files: name → content, in the working folder.
        compiler: whether to mount the system's programs and headers, and allow new processes and
            files.

    Raises:
        SandboxUnavailable: bubblewrap is missing.
        SandboxError: the sandbox fails twice."""
    try:
        return _run_once(command, budget, stdin, files, compiler)
    except SandboxError:  # the host may be out of processes or memory for a moment
        time.sleep(0.1)
        return _run_once(command, budget, stdin, files, compiler)


def sealed_file(content: bytes) -> BinaryIO:
    """Return an open file in memory, without a name, that no process can change."""
    file = os.fdopen(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(content)
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def launch_sandbox(
    stack: contextlib.ExitStack,
    command: Sequence[str],
    budget: Budget,
    stdin: int,
    files: Mapping[str, bytes],
    compiler: bool = False,
) -> SandboxProcess:
    """Start a sandbox.

    Args:
        stack: closes the sandbox's files; the caller closes the sandbox before that.
        command: the command and its arguments.
        budget: the limits of the run.
        stdin: the standard input, as for `Popen`.
        files: name → content, in the working folder.
        compiler: as for `run_command`."""
    system_calls = build_filter(compiler=compiler)
    fds = [stack.enter_context(sealed_file(content)).fileno() for content in files.values()]
    options: list[str] = []
    for name, fd in zip(files, fds, strict=True):
        options += ["--perms", "0700", "--file", str(fd), f"{WORK}/{name}"]
    status_read, status_write = os.pipe()
    filter_read, filter_write = os.pipe()
    stack.callback(os.close, status_read)
    filter_file = stack.enter_context(os.fdopen(filter_write, "wb"))
    arguments = [
        *requirements.find_launcher(),
        *NAMESPACES,
        *_mount_options(compiler, budget.disk_bytes),
        *options,
    ]
    arguments += ["--remount-ro", "/", "--seccomp", str(filter_read)]
    arguments += ["--json-status-fd", str(status_write), "--", *_prlimit_command(budget), *command]
    started_at = time.monotonic()
    try:
        process = subprocess.Popen(
            arguments,
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[status_write, filter_read, *fds],
            env=PROGRAM_ENVIRONMENT,
        )
    finally:
        os.close(status_write)
        os.close(filter_read)
    stack.enter_context(process)
    return SandboxProcess(process, status_read, filter_file, system_calls, budget, started_at)


def _run_once(
    command: Sequence[str],
    budget: Budget,
    stdin: bytes,
    files: Mapping[str, bytes],
    compiler: bool,
) -> ProgramOutcome:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(sealed_file(stdin)).fileno()
        sandbox = launch_sandbox(stack, command, budget, source, files, compiler)
        with contextlib.closing(sandbox):
            return sandbox.wait()


@functools.cache
def _mount_options(compiler: bool, disk_bytes: int) -> tuple[str, ...]:
    """Return bwrap's options for the files of the sandbox.

    A program sees the shared libraries and the interpreter or, with `compiler`, the system's
    programs and headers, all read-only. It sees no /etc, /home, /root, /proc, /sys, /tmp, and no
    device except /dev/null. Only the compiler has a writable working folder, of `disk_bytes`."""
    arguments: list[str] = []
    for folder in LIBRARIES + (COMPILER_FOLDERS if compiler else ()):
        if os.path.isdir(folder) and not os.path.islink(folder):
            arguments += ["--ro-bind", folder, folder]
    for link in LIBRARY_LINKS:
        if os.path.islink(link):
            arguments += ["--symlink", str(Path(link).resolve()), link]
        elif os.path.isdir(link):
            arguments += ["--ro-bind", link, link]
    if compiler:
        arguments += ["--symlink", "usr/bin", "/bin", "--size", str(disk_bytes), "--tmpfs", WORK]
    else:
        arguments += [
            *requirements.find_interpreter()[1],
            "--ro-bind",
            requirements.PRLIMIT,
            requirements.PRLIMIT,
        ]
        arguments += ["--dir", WORK]
    return (*arguments, "--dev-bind", "/dev/null", "/dev/null", "--chdir", WORK)


def _prlimit_command(budget: Budget) -> list[str]:
    """Return the prlimit(1) command line: soft and hard limits, none above this process's own."""
    limits = {
        "cpu": math.ceil(budget.cpu_seconds),
        "as": budget.memory_bytes,
        "stack": budget.stack_bytes,
        "nproc": budget.processes,
        "fsize": budget.disk_bytes,
        "nofile": NUM_OPEN_FILES,
        **dict.fromkeys(("core", "memlock", "msgqueue"), 0),
    }
    arguments = [requirements.PRLIMIT]
    for name, value in limits.items():
        hard_limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        value = value if hard_limit == resource.RLIM_INFINITY else min(value, hard_limit)
        # Programs that recurse raise their own stack; the address space bounds it anyway.
        arguments.append(f"--{name}={value}:" + ("" if name == "stack" else str(value)))
    return arguments
