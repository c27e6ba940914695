"""Run one program once, in a sandbox of its own.

prlimit(1) sets the limits inside the sandbox and then becomes the program: there, `processes`
counts what runs in the sandbox's own user namespace (Linux 5.14), not all processes of the user on
the host.
"""

import math
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence

from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.bwrap_options import ENVIRONMENT, WORK, bwrap_options
from megatron_r1.rewards.sandbox.limits import Budget
from megatron_r1.rewards.sandbox.process import Outcome, SandboxError, SandboxProcess
from megatron_r1.rewards.sandbox.sealed_file import SealedFile
from megatron_r1.rewards.sandbox.seccomp import build_filter

NUM_OPEN_FILES = 64
_filters: dict[bool, SealedFile] = {}


def run(
    command: Sequence[str],
    budget: Budget,
    *,
    stdin: SealedFile,
    files: Mapping[str, SealedFile],
    compiler: bool = False,
) -> Outcome:
    """Run `command` with `files` in its working folder; the sandbox is gone on return.

    compiler: mount the system's programs and headers, and allow new processes and files. Raises
    SandboxUnavailable where bubblewrap is missing, SandboxError where it fails twice.
    """
    try:
        return _run_once(command, budget, stdin, files, compiler)
    except SandboxError:  # the host may be out of processes or memory for a moment
        time.sleep(0.1)
        return _run_once(command, budget, stdin, files, compiler)


def _run_once(
    command: Sequence[str],
    budget: Budget,
    stdin: SealedFile,
    files: Mapping[str, SealedFile],
    compiler: bool,
) -> Outcome:
    if compiler not in _filters:
        _filters[compiler] = SealedFile(build_filter(compiler=compiler))
    seccomp = _filters[compiler].rewind()
    status_read, status_write = os.pipe()
    block_read, block_write = os.pipe()
    inherited = [status_write, block_read, seccomp]
    arguments = [*host.launcher(), *bwrap_options(compiler=compiler, disk_bytes=budget.disk_bytes)]
    for name, file in files.items():
        fd = file.rewind()
        inherited.append(fd)
        arguments += ["--perms", "0700", "--file", str(fd), f"{WORK}/{name}"]
    arguments += ["--remount-ro", "/", "--seccomp", str(seccomp), "--block-fd", str(block_read)]
    arguments += ["--json-status-fd", str(status_write), "--", *_prlimit(budget), *command]
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            arguments,
            bufsize=0,
            stdin=stdin.rewind(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            env=ENVIRONMENT,
        )
    except BaseException:
        os.close(status_read)
        os.close(block_write)
        raise
    finally:
        os.close(status_write)
        os.close(block_read)
    sandbox = SandboxProcess(process, status_read, block_write, budget, started)
    try:
        return sandbox.wait()
    finally:
        sandbox.close()


def _prlimit(budget: Budget) -> list[str]:
    """Return the prlimit(1) command line: soft and hard limits, none above this process's own."""
    limits = {
        "cpu": math.ceil(budget.cpu_seconds),
        "as": budget.memory_bytes,
        "stack": budget.stack_bytes,
        "nproc": budget.processes,
        "fsize": budget.disk_bytes,
        "nofile": NUM_OPEN_FILES,
        "core": 0,
        "memlock": 0,
        "msgqueue": 0,
    }
    arguments = [host.PRLIMIT]
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Programs that recurse raise their own stack; the address space bounds it anyway.
        arguments.append(f"--{name}={value}:" + ("" if name == "stack" else str(value)))
    return arguments
