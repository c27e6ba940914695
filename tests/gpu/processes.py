"""Programs that checks start."""

import re
import subprocess
import sys
from collections.abc import Sequence

from tools.bench.host import ROOT, environment


def error_in(output: str) -> str:
    """The last line of a program's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(Error|Exception|Assertion)\b.*:", line)]
    return (errors or lines or ["no output"])[-1][-400:]


def output_of(arguments: Sequence[str], name: str, **variables: str) -> str:
    """What a program of this Python prints, which is printed at once, too; its error where it
    fails."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=ROOT,
        env=environment(PYTHONWARNINGS="ignore", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        except BaseException:  # the check's time is over
            process.kill()
            raise
    output = "".join(lines)
    assert not process.returncode, f"{name} ended with {process.returncode}: {error_in(output)}"
    return output
