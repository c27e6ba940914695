"""Copies of the source tree, and runs of pytest in them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CPU_SECONDS = 120
"""Of one process with a fault: more than the tests of any fault take. An endless loop ends here; a
test that waits for ever is ended by the watchdog of tests/conftest.py."""
IDLE_SECONDS = 60
"""After which that watchdog takes a test that does nothing for a hanging one."""
CHECK = (
    "import megatron_r1, r1_grading, r1_kernels\n"
    "for package in (megatron_r1, r1_grading, r1_kernels): print(package.__file__)"
)
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not more and not slow")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
NO_TEST_RAN = 5  # pytest's exit status


class TreeCopy:
    """A copy of the files that git knows or would add, in a folder that `close` deletes.

    Raises RuntimeError where Python, started there, imports other files than the copy's."""

    def __init__(self, root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.check_output(listing, cwd=root, text=True)
        for name in filter(None, listed.split("\0")):
            if (root / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.folder / name)
        path = os.pathsep.join([str(self.folder / part) for part in ("", "kernels", "grading")])
        self._environment = os.environ | {
            "PYTHONPATH": path,
            "OMP_WAIT_POLICY": "passive",
            "R1_TEST_IDLE_SECONDS": str(IDLE_SECONDS),
        }
        imported = subprocess.check_output(
            [sys.executable, "-c", CHECK], cwd=self.folder, env=self._environment, text=True
        )
        for file in imported.splitlines():
            if self.folder not in Path(file).parents:
                raise RuntimeError(f"the copy in {self.folder} imports {file}")

    def close(self) -> None:
        """Delete the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, path: Path, text: str) -> None:
        """Replace a file of the copy, and delete its compiled form: Python compares only size and
        second."""
        file = self.folder / path
        file.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(file)).unlink(missing_ok=True)

    def run(self, tests: list[str], limit: str = "unlimited") -> tuple[int, str]:
        """Run tests up to the first failure; return pytest's exit status and its output. limit: CPU
        seconds of each process."""
        limited = ["sh", "-c", f'ulimit -S -t {limit}; exec "$@"', "sh", sys.executable]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [*limited, *PYTEST, *tests],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait()
            with contextlib.suppress(ProcessLookupError):  # what a failed test has left
                os.killpg(process.pid, signal.SIGKILL)
            log.seek(0)
            return status, log.read()


def failure_of(status: int, output: str) -> str | None:
    """Return the first test that failed, or how else pytest ended; None where all passed."""
    if status == 0:
        return None
    if status == NO_TEST_RAN:
        return "none of them is in make test"
    first = FIRST_FAILURE.search(output)
    return first[1] if first else f"pytest ended with {status}: {output.strip()[-200:]!r}"
