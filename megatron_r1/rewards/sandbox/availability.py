"""Check once, with a harmless program, whether this machine can run sandboxes."""

import functools
import platform
import re

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.limits import Limits
from megatron_r1.rewards.sandbox.process import SandboxError
from megatron_r1.rewards.sandbox.programs import python_script
from megatron_r1.rewards.sandbox.run import run

OLDEST_KERNEL = (5, 14)
"""In older kernels the limit on processes counts all of the user's, not those in the sandbox."""


@functools.cache
def require(language: str) -> None:
    """Return if programs in `language` ("python", "cpp") can be graded on this machine.

    Otherwise raise SandboxUnavailable, a UserError with the remedy.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if release and tuple(map(int, release.groups())) < OLDEST_KERNEL:
        raise host.SandboxUnavailable(
            f"graded programs need Linux {'.'.join(map(str, OLDEST_KERNEL))} or newer, this is "
            f"{platform.release()}: run them on a newer system"
        )
    host.launcher()
    if language == "cpp":
        host.compiler()
    program = python_script("print(6 * 7)")
    try:
        outcome = run(program.command, Limits().program(), files=program.files)
    except SandboxError as error:
        raise host.SandboxUnavailable(
            f"graded programs run in a sandbox or not at all, and it cannot be built ({error}): "
            "allow user namespaces (Debian: sysctl kernel.unprivileged_userns_clone=1; Ubuntu: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined --security-opt "
            "systempaths=unconfined)"
        ) from None
    if outcome.stdout != b"42\n":
        message = shorten(outcome.stderr.decode("utf-8", "replace"), 300)
        raise host.SandboxUnavailable(
            f"a trivial program fails in the sandbox (status {outcome.status}: {message}): "
            "install the system's Python (apt-get install python3)"
        )
