"""Runs the program of a check in a process of its own, which frees the GPU when it ends."""

import subprocess
import sys
from collections.abc import Sequence

from tools.bench.host import ROOT, environment
from tools.gpu_check import verdict
from tools.gpu_check.verdict import Failed


def output_of(arguments: Sequence[str], what: str, **variables: str) -> str:
    """Print and return what a program of this Python prints.

    Args:
        arguments: the arguments of the Python program.
        what: the subject of the sentence that says how it failed.
        **variables: further variables of its environment.

    Raises:
        Failed: it ended with another status than 0."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(PYTHONWARNINGS="ignore", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise Failed(f"{what} ended with status {done.returncode}: {verdict.error_in(done.stdout)}")
    return done.stdout
