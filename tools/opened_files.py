"""Which files a command and all processes that it starts open, as strace sees it.

Hooks of Python see neither compilers nor shared libraries, and LD_PRELOAD is taken by the null GPU.
With seccomp only the traced calls stop a process: tests/unit/null_gpu/test_push_in_rounds.py takes
47 s of processor time with it and 40 to 46 without."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

OPENED = re.compile(rb'^\d+ +\w+\((?:[\w-]+<([^>]*)>, )?"([^"]+)"')
"""A line of strace -y: the folder that a name is relative to, and the name."""


def run_traced(command: Sequence[str]) -> tuple[int, set[str]]:
    """Run a command; return its status and the absolute names of the files that were opened or
    executed, with links and ".." as they were given."""
    if not shutil.which("strace"):
        sys.exit("strace is not installed, which sees the opened files: apt-get install strace")
    calls = ("--seccomp-bpf", "-e", "trace=open,openat,execve", "-e", "signal=none")
    with tempfile.TemporaryDirectory(prefix="opened_files_") as scratch:
        trace = f"{scratch}/trace"
        # Of calls that succeed (-z), with the folders of file descriptors (-y).
        strace = ["strace", "-f", "-qqq", "-z", "-y", *calls, "-o", trace, *command]
        status = subprocess.run(strace, check=False).returncode
        with open(trace, "rb") as lines:
            calls_made = {match.groups() for line in lines if (match := OPENED.match(line))}
    names = {os.path.join(folder or os.getcwdb(), name) for folder, name in calls_made}
    return status, set(map(os.fsdecode, names))
