"""Programs of the host that the sandbox needs: bubblewrap, prlimit, a Python, a compiler.

Each function raises SandboxUnavailable with the remedy where one is missing."""

import functools
import os
import shutil
import stat
import sys
from pathlib import Path

from r1_grading.base.errors import Cause, UserError

NOBODY = 65534
"""User and group id inside every sandbox; outside too, where the grader runs as root."""

COMPILER, PRLIMIT = "/usr/bin/g++", "/usr/bin/prlimit"


class SandboxUnavailable(UserError):
    """Raised where a machine cannot run sandboxes: no program runs; the message has the remedy."""


@functools.cache
def find_launcher() -> tuple[str, ...]:
    """Return the start of every command line, up to bwrap itself.

    Root changes to user NOBODY first: limits on processes do not bind root, and a program that
    escaped from the namespaces would be root on the host."""
    bwrap = _find_program("bwrap", "bubblewrap")
    _find_program(PRLIMIT, "util-linux")
    if os.geteuid() != 0:
        return (bwrap,)
    setpriv = _find_program("setpriv", "util-linux")
    return (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", bwrap)


@functools.cache
def find_interpreter() -> tuple[str, tuple[str, ...]]:
    """Return the path of a Python inside the sandbox, and the bwrap options that mount it.

    It is this process's Python if the sandbox user can read it, else the system's.

    Raises:
        SandboxUnavailable: the sandbox user can read neither Python.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix).resolve()
    python, library = prefix / "bin" / version, prefix / "lib" / version
    if prefix != Path("/usr") and python.exists() and _is_readable(python, library / "os.py"):
        mounts: tuple[str, ...] = ("--ro-bind", str(python), "/python/bin/python3")
        mounts += ("--ro-bind", str(prefix / "lib"), "/python/lib")
        mounts += ("--setenv", "LD_LIBRARY_PATH", "/python/lib")  # a shared libpython
        if (library / "site-packages").is_dir():
            packages = f"/python/lib/{version}/site-packages"
            mounts += ("--tmpfs", packages, "--remount-ro", packages)
        return "/python/bin/python3", mounts
    system = Path("/usr/bin/python3").resolve()
    if not system.exists():
        raise SandboxUnavailable(
            f"graded programs need a Python that the sandbox may read, and {python} is private to "
            "one user: install the system's (apt-get install python3)",
            key="python3",
            cause=Cause.UNREADABLE,
        )
    return str(system), ("--ro-bind", str(system), str(system))


@functools.cache
def find_compiler() -> str:
    """Return the system's g++: its headers and libraries are in folders that the sandbox mounts.

    Raises:
        SandboxUnavailable: g++ is not installed.
    """
    if not os.access(COMPILER, os.X_OK):
        raise SandboxUnavailable(
            f"C++ programs need {COMPILER}, which is missing: apt-get install g++",
            key="g++",
            cause=Cause.NOT_INSTALLED,
        )
    return COMPILER


def _find_program(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise SandboxUnavailable(
            f"graded programs run in a sandbox or not at all, and {program} is missing: "
            f"apt-get install {package} (or your system's package of that name)",
            key=Path(program).name,
            cause=Cause.NOT_INSTALLED,
        )
    return path


def _is_readable(*paths: Path) -> bool:
    """Whether the user that the sandbox runs as can open all of `paths`."""
    if os.geteuid() != 0:
        return all(os.access(path, os.R_OK) for path in paths)
    return all(
        path.stat().st_mode & stat.S_IROTH
        and all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
        for path in paths
    )
