"""The durable sample log: a finished group is on disk as soon as it is graded.

The run's folder has one file per step. When any part of the run was killed, the same command reads
the groups of the steps after its checkpoint from there and samples only what was unfinished.
Training is a function of weights and samples: a step that is repeated from the log ends in the
same weights, and the samples made from these weights afterwards stay valid.

Durability: a group survives a kill of any process once it is written, and a power cut after
`SYNC_SECONDS`; a batch is trained on only once all of it is synced. So the log never holds samples
of a policy whose own training samples are lost, nor samples of an engine whose weights have not
been probed since they were pushed. A thread does the writing."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.files import fsync
from megatron_r1.base.files.framed_records import FramedFile, append_frame
from megatron_r1.controller.rollouts.group_records import (
    CommitRecord,
    GroupRecord,
    SamplingRecord,
    decode,
    encode,
    from_record,
    to_record,
)
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.data.prompt import Prompt


def step_log_path(folder: Path, step: int) -> Path:
    """Return the file of `step` in the folder of a run's sample log."""
    return folder / f"step_{step:08d}.log"


SYNC_SECONDS = 1.0
_FILE_NAME = re.compile(r"step_(\d{8,})\.log")


class SampleLog:
    """The logs of a run's steps. One process at a time may use them, from one event loop."""

    def __init__(self, folder: Path, notify: Callable[[str], None] = lambda line: None) -> None:
        """Open the folder; logs of single steps are opened by `step`.

        Args:
            folder: the folder of the logs.
            notify: called with a message for the user where a file is damaged."""
        self.folder, self._notify = folder, notify
        self._thread = ThreadPoolExecutor(1, "sample-log")
        self._open: dict[Path, int] = {}
        self._unsynced: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self._buffered: list[tuple[Path, Callable[[], GroupRecord | CommitRecord]]] = []
        self._may_write = asyncio.Event()
        self._may_write.set()

    def start_buffering(self) -> None:
        """Write nothing until `write_buffered`. What the buffer has is dropped."""
        self._may_write.clear()
        self._buffered.clear()

    def write_buffered(self) -> None:
        """Write the buffer, and from now on what is appended."""
        self._may_write.set()
        buffered_files, self._buffered = self._buffered, []
        for path, make in buffered_files:
            self.append(path, make)

    async def step(self, step: int, schedule: str = "") -> StepLog:
        """Open the log of `step`, with the groups that it already holds.

        Args:
            step: the training step, from 1.
            schedule: `config.schedule.digest_until` the step; groups that were sampled under
                another schedule, as a continued run may have it, are not used."""
        path = step_log_path(self.folder, step)
        step_log = await asyncio.wrap_future(self._thread.submit(StepLog, self, path, schedule))
        if step_log.num_damaged_bytes:
            self._notify(
                f"{path}: {step_log.num_damaged_bytes:,} bytes are no whole record, as a kill "
                "leaves them; whole records are used, the rest is sampled again"
            )
        return step_log

    def append(self, path: Path, make: Callable[[], GroupRecord | CommitRecord]) -> None:
        """Write the record that `make` returns, in the thread. A failure is raised by `finish`."""
        if not self._may_write.is_set():
            self._buffered.append((path, make))
            return
        self._thread.submit(self._append_record, path, make)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SYNC_SECONDS, self._sync_later)

    async def finish(self, path: Path) -> None:
        """Wait until everything appended is on disk, and close `path`.

        Raises:
            RunError: writing failed.
            Exception: what else an append has raised.
        """
        await self._may_write.wait()
        # Before the batch is trained on: otherwise a later group could outlive, on disk, the policy
        # that made it.
        await asyncio.wrap_future(self._thread.submit(self._sync_files))
        await asyncio.wrap_future(self._thread.submit(self._close_file, path))
        if isinstance(self._failure, OSError):
            raise RunError(
                f"{self.folder}: samples cannot be written down ({self._failure}); make room, or "
                "set rl.sample_log: false, and run the same command again"
            )
        if self._failure is not None:
            raise self._failure

    async def prune(self, last_step: float = math.inf) -> None:
        """Delete the logs up to `last_step`, to which no checkpoint goes back; default all."""
        await asyncio.wrap_future(self._thread.submit(self._remove_steps, last_step))

    async def close(self) -> None:
        """Sync and end the thread. May be called more than once."""
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(self._thread.shutdown)
        self._sync_files()
        for path in list(self._open):
            self._close_file(path)

    def _sync_later(self) -> None:
        self._timer = None
        self._thread.submit(self._sync_files)

    def _append_record(self, path: Path, make: Callable[[], GroupRecord | CommitRecord]) -> None:
        if self._failure is not None:
            return
        try:
            if path not in self._open:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._open[path] = os.open(path, flags, 0o644)
                fsync(path.parent)
            append_frame(self._open[path], encode(make()))
            self._unsynced.add(self._open[path])
        # Every exception is kept, for `finish` to raise: nothing else reads this call's result, and
        # a batch may be trained on only when all of it is on disk.
        except Exception as error:  # noqa: BLE001
            self._failure = error

    def _sync_files(self) -> None:
        try:
            for descriptor in self._unsynced:
                os.fsync(descriptor)
        except OSError as error:
            self._failure = self._failure or error
        self._unsynced.clear()

    def _remove_steps(self, last_step: float) -> None:
        for path in self.folder.glob("step_*.log"):
            match = _FILE_NAME.fullmatch(path.name)
            if match and int(match[1]) <= last_step:
                path.unlink()
                self._close_file(path)

    def _close_file(self, path: Path) -> None:
        if (descriptor := self._open.pop(path, None)) is not None:
            self._unsynced.discard(descriptor)
            os.close(descriptor)


class StepLog:
    """One step's groups, by the position of their prompt among all that the step draws.

    Batches that draw in rounds (`collect_dynamic_rollout`) thus continue in the round that they
    were in."""

    def __init__(self, sample_log: SampleLog, path: Path, schedule: str) -> None:
        """Read the records of a step that were written under `schedule`.

        Args:
            sample_log: the sample log of the run, which writes new records.
            path: the step's file in it.
            schedule: as in `SampleLog.step`.

        Raises:
            UserError: records of another format."""
        self._sample_log, self._path, self._schedule = sample_log, path, schedule
        self._records: dict[int, GroupRecord] = {}
        self.is_committed = False
        file = FramedFile.read(path)
        self.num_damaged_bytes = file.num_damaged_bytes
        for payload in file:
            try:
                record = decode(payload)
            except msgspec.MsgspecError as error:
                raise UserError(
                    f"{path}: written by another version of this program ({error}); delete it, and "
                    "its samples are made again",
                    key=path.name,
                    cause=Cause.CHANGED,
                ) from None
            if record.schedule != schedule:
                continue
            if isinstance(record, CommitRecord):
                self.is_committed = True
            else:
                self._records[record.prompt_index] = record
        self._drawn = 0
        self.num_restored = 0

    def reserve(self, count: int) -> range:
        """Return the positions of the `count` prompts that the step draws next."""
        self._drawn += count
        return range(self._drawn - count, self._drawn)

    def restore(self, prompt_index: int, prompt: Prompt, only_final: bool = False) -> Group | None:
        """Return the finished group of `prompt` at `prompt_index`, or None.

        Args:
            prompt_index: its index among all prompts that the step drew.
            prompt: what the step has drawn there now; a record of another prompt is discarded.
            only_final: return the group only if it `is_final`."""
        record = self._records.pop(prompt_index, None)
        if record is None or record.prompt_id != prompt.id:
            return None
        group = from_record(record, prompt)
        if only_final and not self.is_final(group):
            return None
        self.num_restored += 1
        return group

    def is_final(self, group: Group) -> bool:
        """Whether a restored group's grades stand. Ungraded responses are graded again, as the
        reward may have been repaired, unless the batch was trained on with these grades."""
        return self.is_committed or not any(graded.ungraded_terms for graded in group.responses)

    def append(
        self, prompt_index: int, group: Group, sampling: SamplingRecord | None = None
    ) -> None:
        """Append a group at its position in the step; packing and writing go on behind the
        caller.

        Args:
            prompt_index: the index of the group's prompt among all that the step drew.
            group: the finished group.
            sampling: how it was sampled."""
        self._sample_log.append(
            self._path, lambda: to_record(prompt_index, group, self._schedule, sampling)
        )

    async def commit(self) -> None:
        """Record that the batch is complete and will be trained on; returns when all of it is on
        disk.

        Raises:
            RunError: writing failed.
        """
        if not self.is_committed:
            self._sample_log.append(self._path, lambda: CommitRecord(self._schedule))
            self.is_committed = True
        await self._sample_log.finish(self._path)
