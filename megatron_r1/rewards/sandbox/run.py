"""Run one program once, in a sandbox of its own.

prlimit(1) sets the limits inside the sandbox and then becomes the program: there, `processes`
counts what runs in the sandbox's own user namespace (Linux 5.14), not all processes of the user on
the host."""

import contextlib
import fcntl
import functools
import math
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.limits import Budget
from megatron_r1.rewards.sandbox.process import ProgramOutcome, SandboxError, SandboxProcess
from megatron_r1.rewards.sandbox.seccomp import build_filter

NUM_OPEN_FILES = 64
WORK = "/work"
"""The working folder. A program cannot write even there: files in memory do not count against the
limit on address space, and their number cannot be limited."""
ENVIRONMENT = {
    **{"PATH": "/usr/bin", "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
    # The same answer gets the same reward, even if it depends on the order of a set.
    "PYTHONHASHSEED": "0",
}
NAMESPACES = (
    *("--unshare-all", "--unshare-user", "--uid", str(host.NOBODY), "--gid", str(host.NOBODY)),
    # A session of its own: otherwise TIOCSTI could type into the grader's terminal (CVE-2017-5226).
    *("--hostname", "sandbox", "--die-with-parent", "--new-session"),
    # The program is process 1 itself: bwrap then waits for it and reaps it. Otherwise every run
    # leaves a zombie in containers whose first process reaps nothing.
    "--as-pid-1",
)
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64")
LINKS = ("/lib", "/lib32", "/lib64")
COMPILER_FOLDERS = ("/usr/bin", "/usr/include", "/usr/libexec")


def run(
    command: Sequence[str],
    budget: Budget,
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes],
    compiler: bool = False,
) -> ProgramOutcome:
    """Run `command` with `files` in its working folder; the sandbox is gone on return.

    compiler: mount the system's programs and headers, and allow new processes and files. Raises
    SandboxUnavailable where bubblewrap is missing, SandboxError where it fails twice."""
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


def launch(
    stack: contextlib.ExitStack,
    command: Sequence[str],
    budget: Budget,
    stdin: int,
    files: Mapping[str, bytes],
    compiler: bool = False,
) -> SandboxProcess:
    """Start a sandbox. `stack` closes its files; the caller closes the sandbox before that. stdin:
    as for `Popen`; the other arguments: as for `run`."""
    system_calls = build_filter(compiler=compiler)
    fds = [stack.enter_context(sealed_file(content)).fileno() for content in files.values()]
    options: list[str] = []
    for name, fd in zip(files, fds, strict=True):
        options += ["--perms", "0700", "--file", str(fd), f"{WORK}/{name}"]
    status_read, status_write = os.pipe()
    filter_read, filter_write = os.pipe()
    stack.callback(os.close, status_read)
    filter_file = stack.enter_context(os.fdopen(filter_write, "wb"))
    arguments = [*host.launcher(), *NAMESPACES, *_view(compiler, budget.disk_bytes), *options]
    arguments += ["--remount-ro", "/", "--seccomp", str(filter_read)]
    arguments += ["--json-status-fd", str(status_write), "--", *_prlimit(budget), *command]
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            arguments,
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[status_write, filter_read, *fds],
            env=ENVIRONMENT,
        )
    finally:
        os.close(status_write)
        os.close(filter_read)
    stack.enter_context(process)
    return SandboxProcess(process, status_read, filter_file, system_calls, budget, started)


def _run_once(
    command: Sequence[str],
    budget: Budget,
    stdin: bytes,
    files: Mapping[str, bytes],
    compiler: bool,
) -> ProgramOutcome:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(sealed_file(stdin)).fileno()
        sandbox = launch(stack, command, budget, source, files, compiler)
        with contextlib.closing(sandbox):
            return sandbox.wait()


@functools.cache
def _view(compiler: bool, disk_bytes: int) -> tuple[str, ...]:
    """Return bwrap's options for the files of the sandbox.

    A program sees the shared libraries and the interpreter or, with `compiler`, the system's
    programs and headers, all read-only. It sees no /etc, /home, /root, /proc, /sys, /tmp, and no
    device except /dev/null. Only the compiler has a writable working folder, of `disk_bytes`."""
    arguments: list[str] = []
    for folder in LIBRARIES + (COMPILER_FOLDERS if compiler else ()):
        if os.path.isdir(folder) and not os.path.islink(folder):
            arguments += ["--ro-bind", folder, folder]
    for link in LINKS:
        if os.path.islink(link):
            arguments += ["--symlink", str(Path(link).resolve()), link]
        elif os.path.isdir(link):
            arguments += ["--ro-bind", link, link]
    if compiler:
        arguments += ["--symlink", "usr/bin", "/bin", "--size", str(disk_bytes), "--tmpfs", WORK]
    else:
        arguments += [*host.interpreter()[1], "--ro-bind", host.PRLIMIT, host.PRLIMIT]
        arguments += ["--dir", WORK]
    return (*arguments, "--dev-bind", "/dev/null", "/dev/null", "--chdir", WORK)


def _prlimit(budget: Budget) -> list[str]:
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
    arguments = [host.PRLIMIT]
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Programs that recurse raise their own stack; the address space bounds it anyway.
        arguments.append(f"--{name}={value}:" + ("" if name == "stack" else str(value)))
    return arguments
