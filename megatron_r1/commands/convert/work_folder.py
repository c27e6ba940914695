"""The folder of an unfinished conversion, which is renamed to OUT at the end."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync

_PLAN, _LOCK = ".plan.json", ".lock"


class WorkFolder:
    """The folder `OUT.incomplete`, locked by one process at a time.

    An interrupted conversion with the same plan is continued.

    Args:
        out: the folder that the finished one becomes.
        plan: source and options, as JSON.

    Raises:
        UserError: OUT exists, the folder has another plan, or another process holds it."""

    def __init__(self, out: Path, plan: dict[str, Any]):
        if out.exists():
            raise UserError(
                f"{out} exists already; remove it or give another OUT",
                key="out",
                cause=Cause.EXISTS,
            )
        self.out, self.path = out, out.with_name(out.name + ".incomplete")
        self._plan = self.path / _PLAN
        self._plan_beside = self.path.with_name(f".{self.path.name}{_PLAN}")
        if not self.path.exists():  # the plan next to it was of a folder that somebody removed
            self._plan_beside.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / _LOCK, "a")  # noqa: SIM115 - held open for the lock
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{self.path} is being written by another conversion", key="out", cause=Cause.BUSY
            ) from error
        self._check_plan(plan)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def check_space(self, num_bytes: int) -> None:
        """Raise UserError unless `num_bytes`, less what is already written, are free."""
        present = sum(f.stat().st_blocks * 512 for f in self.path.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.path).free
        remainder = max(0, num_bytes - present)
        if remainder > free:
            self.abandon_empty()
            raise UserError(
                f"{self.out} needs {remainder:,} more bytes, {self.out.parent} has {free:,} free: "
                "make room or write to another disk",
                key="out",
                cause=Cause.TOO_LARGE,
            )

    def abandon_empty(self) -> None:
        """Remove the folder if no file was finished yet."""
        if not any(file.suffix in (".safetensors", ".distcp") for file in self.path.iterdir()):
            shutil.rmtree(self.path)

    def finish(self, last: Callable[[Path], None] = lambda folder: None) -> None:
        """Call `last` on the folder without its own files, then rename it to OUT. Until then the
        plan lies next to it: a conversion that is killed here is continued by the same plan."""
        self._plan.rename(self._plan_beside)
        (self.path / _LOCK).unlink()
        last(self.path)
        for path in [*self.path.rglob("*"), self.path]:
            fsync(path)
        self.path.rename(self.out)
        self._lock.close()
        fsync(self.out.parent)
        self._plan_beside.unlink()

    def _check_plan(self, plan: dict[str, Any]) -> None:
        if self._plan_beside.exists():
            self._plan_beside.rename(self._plan)
        if not self._plan.exists():
            atomic_write(self._plan, json.dumps(plan))
            return
        before = json.loads(self._plan.read_text(encoding="utf-8"))
        current = json.loads(json.dumps(plan))
        if changed := [key for key in current if before.get(key) != current[key]]:
            other_items = [
                key
                if isinstance(current[key], dict)
                else f"{key} {before.get(key)} there, {current[key]}"
                for key in changed
            ]
            raise UserError(
                f"{self.path} holds an unfinished conversion of something else "
                f"({'; '.join(other_items)} now); continue that one, or remove the folder",
                key="out",
                cause=Cause.CHANGED,
            )
