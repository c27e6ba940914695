"""The verdict of a check: the last line that its process prints."""

import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


class Failed(Exception):
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
        check: returns its figures, and raises `Failed` or `Impossible`; what else it raises is a
            failure, too."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        verdict = Verdict(PASSED, figures=check())
    except Impossible as why:
        verdict = Verdict(IMPOSSIBLE, str(why))
    except Failed as why:
        verdict = Verdict(FAILED, str(why), why.figures)
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict(FAILED, f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    print(MARK + json.dumps(verdict._asdict()), flush=True)
    return int(verdict.status == FAILED)


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Failed("it was not done within its time")


def read(lines: list[str]) -> Verdict | None:
    """Return the verdict among the lines of an output; None where there is none."""
    said = [line for line in lines if line.startswith(MARK)]
    return Verdict(**json.loads(said[-1].removeprefix(MARK))) if said else None


def error_in(output: str) -> str:
    """Return the last line of a program's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(Error|Exception|Assertion)\b.*:", line)]
    return (named or lines or ["no output"])[-1][-400:]
