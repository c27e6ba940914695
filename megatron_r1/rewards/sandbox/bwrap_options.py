"""The bubblewrap options that define what a program in the sandbox can see and do."""

import functools
import os
from pathlib import Path

from megatron_r1.rewards.sandbox import host

WORK = "/work"
"""The working folder. A program cannot write even there: files in memory do not count against the
limit on address space, and their number cannot be limited."""

ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": WORK,
    "TMPDIR": WORK,
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    # The same answer gets the same reward, even if it depends on the order of a set.
    "PYTHONHASHSEED": "0",
}
NAMESPACES = (
    *("--unshare-all", "--unshare-user", "--uid", str(host.NOBODY), "--gid", str(host.NOBODY)),
    *("--hostname", "sandbox", "--die-with-parent", "--new-session"),
    # The program is process 1 itself: bwrap then waits for it and reaps it. Otherwise every run
    # leaves a zombie in containers whose first process reaps nothing.
    "--as-pid-1",
)
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64")
LINKS = ("/lib", "/lib32", "/lib64")
COMPILER_FOLDERS = ("/usr/bin", "/usr/include", "/usr/libexec")


def bwrap_options(*, compiler: bool, disk_bytes: int) -> list[str]:
    """Return bwrap's options up to the program's own files, which `--remount-ro /` follows.

    All namespaces are new (user, process, network, IPC, host name, cgroup). From the host, the
    sandbox mounts read-only the shared libraries and the interpreter or, with `compiler`, the
    system's programs and headers; no /etc, /home, /root, /proc, /sys, /tmp, and no device but
    /dev/null. Only the compiler gets a writable working folder, of `disk_bytes`.
    """
    work = ["--size", str(disk_bytes), "--tmpfs", WORK] if compiler else ["--dir", WORK]
    return [*NAMESPACES, *_view(compiler), *work, "--chdir", WORK]


@functools.cache
def _view(compiler: bool) -> tuple[str, ...]:
    arguments: list[str] = []
    folders = LIBRARIES + (COMPILER_FOLDERS if compiler else ())
    for folder in folders:
        if os.path.isdir(folder) and not os.path.islink(folder):
            arguments += ["--ro-bind", folder, folder]
    for link in LINKS:
        if os.path.islink(link):
            arguments += ["--symlink", str(Path(link).resolve()), link]
        elif os.path.isdir(link):
            arguments += ["--ro-bind", link, link]
    if compiler:
        arguments += ["--symlink", "usr/bin", "/bin"]
    else:
        arguments += [*host.interpreter().mounts, "--ro-bind", host.PRLIMIT, host.PRLIMIT]
    arguments += ["--dev-bind", "/dev/null", "/dev/null"]
    return tuple(arguments)
