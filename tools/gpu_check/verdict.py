"""Runs the program of a check in a process of its own, which frees the GPU when it ends; the last
line that it prints is its verdict."""

import json
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tools.bench.host import ROOT, environment

MARK = "verdict: "
PASSED, FAILED, IMPOSSIBLE = "passed", "failed", "not possible here"


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        status: one of the three above.
        reason: why it is not "passed".
        figures: what was measured, by name."""

    status: str
    reason: str = ""
    figures: Mapping[str, Any] = {}


class CheckFailed(Exception):
    """The subject of a check is wrong.

    Attributes:
        figures: what was measured until then."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class Impossible(Exception):
    """The check cannot be made on this machine."""


def run(check: Callable[[], Mapping[str, Any]]) -> int:
    """Run a check, print its verdict, and return the exit status of its process.

    SIGTERM says that its time is over.

    Args:
        check: returns its figures, and raises `CheckFailed` or `Impossible`; what else it raises
            is a failure, too."""
    signal.signal(signal.SIGTERM, _fail_on_timeout)
    try:
        verdict = Verdict(PASSED, figures=check())
    except Impossible as why:
        verdict = Verdict(IMPOSSIBLE, str(why))
    except CheckFailed as why:
        verdict = Verdict(FAILED, str(why), why.figures)
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict(FAILED, f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    print(MARK + json.dumps(verdict._asdict()), flush=True)
    return int(verdict.status == FAILED)


def _fail_on_timeout(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise CheckFailed("it was not done within its time")


def read(lines: list[str]) -> Verdict | None:
    """Return the verdict among the lines of an output; None where there is none."""
    marked_lines = [line for line in lines if line.startswith(MARK)]
    return Verdict(**json.loads(marked_lines[-1].removeprefix(MARK))) if marked_lines else None


def error_in(output: str) -> str:
    """Return the last line of a program's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(Error|Exception|Assertion)\b.*:", line)]
    return (errors or lines or ["no output"])[-1][-400:]


def output_of(arguments: Sequence[str], name: str, **variables: str) -> str:
    """Print and return what a program of this Python prints.

    Args:
        arguments: the arguments of the Python program.
        name: the subject of the sentence that says how it failed.
        **variables: further variables of its environment.

    Raises:
        CheckFailed: it ended with another status than 0."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(PYTHONWARNINGS="ignore", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(process.stdout, flush=True)
    if process.returncode:
        raise CheckFailed(
            f"{name} ended with status {process.returncode}: {error_in(process.stdout)}"
        )
    return process.stdout
