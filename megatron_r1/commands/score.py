"""`megatron-r1 score IN.jsonl OUT.jsonl`: every line graded by the reward it names.

    {"kind": "math", "response": "…", "truth": "13"}  →  the same with "reward" and "reason"

`--data.kind math` is the kind of lines that name none. As many lines come out as went in, in their
order; what cannot be graded gets 0 and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_r1.commands.score_tally import ScoreTally
from megatron_r1.config import Config
from megatron_r1.data.records import describe_json_error
from megatron_r1.files import atomic_writer
from megatron_r1.rewards.base import UNGRADED, Grade
from megatron_r1.rewards.options import FACTS, call_fields
from megatron_r1.rewards.remote.service import ServiceError
from megatron_r1.rewards.runtime.pool import RewardPool

ARGUMENTS = ("IN.jsonl", "OUT.jsonl")
SETTINGS = ("rewards", "data.kind")
PIPE = "-"
RESERVED = ("kind", "response", "truth", "reward", "reason")

# What is in memory at once: lines read and not yet written, whichever bound comes first.
MAX_OUTSTANDING_LINES = 4096
MAX_OUTSTANDING_BYTES = 64 * 2**20
MAX_LINE_BYTES = 64 * 2**20
BATCH_BYTES = 2**20

Options = dict[str, dict[str, Any]]


def run(config: Config, source: str, target: str) -> None:
    """Grade `source` into `target`, either of them "-" for a pipe, and print one line of summary.

    Uses every core unless `rewards.workers` is given. `target` appears when all is done. Raises
    ValueError for a source that cannot be read or a target that is no place for a file,
    RuntimeError when no worker can be started, when nobody reads the output, and - once all lines
    are written - when a served model failed or no line at all could be graded: nobody should train
    on such zeros.
    """
    try:
        with _source(source) as lines, _target(target) as graded:
            tally = asyncio.run(_score(config, lines, graded))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more at its exit
        raise RuntimeError("whoever read the output has gone") from None
    print(tally.summary(), file=sys.stderr if target == PIPE else sys.stdout)
    if tally.num_service_failures:
        raise RuntimeError(
            f"reward 0 because a service failed, lines: {tally.num_service_failures:,}; the "
            f"first of them: {tally.first_service_failure}"
        )
    if tally.num_lines and tally.num_ungraded == tally.num_lines:
        raise RuntimeError(
            f"{target}: none of the {tally.num_lines:,} lines could be graded; the first: "
            f"{tally.first_ungraded}"
        )


async def _score(config: Config, lines: BinaryIO, graded: BinaryIO) -> ScoreTally:
    settings = config.rewards
    cores = len(os.sched_getaffinity(0))
    workers = settings.workers if "workers" in settings.model_fields_set else cores
    outstanding: deque[tuple[asyncio.Task, int]] = deque()
    try:
        async with RewardPool(workers, settings.timeout_seconds, settings.memory_bytes) as pool:
            tally = ScoreTally(pool)
            grader = _LineGrader(pool, settings.options, config.data.kind, tally)
            await _stream(grader, lines, graded, tally, outstanding)
    finally:
        await asyncio.gather(*(task for task, _ in outstanding), return_exceptions=True)
    return tally


async def _stream(
    grader: _LineGrader,
    lines: BinaryIO,
    graded: BinaryIO,
    tally: ScoreTally,
    outstanding: deque[tuple[asyncio.Task, int]],
) -> None:
    num_bytes, number = 0, 0
    # In a thread: a pipe that is slow to say more must not stop the workers' replies.
    while batch := await asyncio.to_thread(_read_batch, lines):
        for line in batch:
            number += 1
            task = asyncio.create_task(grader.grade(number, line))
            outstanding.append((task, len(line or b"")))
            num_bytes += len(line or b"")
        while outstanding and (
            len(outstanding) > MAX_OUTSTANDING_LINES or num_bytes > MAX_OUTSTANDING_BYTES
        ):
            num_bytes -= await _write_next(outstanding, graded, tally)
    while outstanding:
        await _write_next(outstanding, graded, tally)


async def _write_next(
    outstanding: deque[tuple[asyncio.Task, int]], graded: BinaryIO, tally: ScoreTally
) -> int:
    """Writes the oldest line once it is graded; its bytes."""
    task, num_bytes = outstanding.popleft()
    record, grade = await task
    graded.write(_encode(record, grade))
    tally.add(record.get("kind"), grade)
    return num_bytes


@dataclass(frozen=True)
class _LineGrader:
    """kind: of lines that name none."""

    pool: RewardPool
    options: Options
    kind: str | None
    tally: ScoreTally

    async def grade(self, number: int, line: bytes | None) -> tuple[dict[str, Any], Grade]:
        """The line's fields, and the verdict on it or on the line itself."""
        if line is None:
            return {}, _refusal(f"line {number} is longer than {MAX_LINE_BYTES:,} bytes")
        if not (stripped := line.strip()):
            return {"line": ""}, _refusal(f"line {number} is blank")
        try:
            record = json.loads(stripped)
        except (ValueError, RecursionError) as error:
            text, found = line.decode("utf-8", "replace").rstrip("\n"), describe_json_error(error)
            return {"line": text}, _refusal(f"line {number} is not JSON: {found}")
        if not isinstance(record, dict):
            return {"line": record}, _refusal(f"line {number} is not an object")
        if self.kind is not None:
            record.setdefault("kind", self.kind)
        return record, await self._grade_record(record)

    async def _grade_record(self, record: dict[str, Any]) -> Grade:
        for name in ("kind", "response"):
            if not isinstance(record.get(name), str):
                found = f"is {type(record[name]).__name__}" if name in record else "is missing"
                return _refusal(f"{name!r} must be a string, it {found}")
        kind, truth = record["kind"], record.get("truth")
        fields = {name: value for name, value in record.items() if name not in RESERVED}
        facts = {name: fields.pop(name) for name in FACTS if name in fields}
        try:
            arguments = call_fields(kind, self.options, fields, facts)
            return await self.pool.grade(kind, record["response"], truth, **arguments)
        except ServiceError as error:
            self.tally.service_failed(str(error))
            return _refusal(str(error))
        except (ValueError, RecursionError) as error:
            return _refusal(str(error))


def _refusal(reason: str) -> Grade:
    return Grade(0.0, f"{UNGRADED}: {reason}")


def _encode(record: dict[str, Any], grade: Grade) -> bytes:
    kept = {name: value for name, value in record.items() if name not in ("reward", "reason")}
    verdict = {"reward": grade.reward, "reason": grade.reason}
    try:
        return (json.dumps(kept | verdict, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        return (json.dumps(kept | verdict) + "\n").encode()
    except RecursionError:
        return (json.dumps(verdict) + "\n").encode()


def _read_batch(lines: BinaryIO) -> list[bytes | None]:
    """The next lines, about BATCH_BYTES of them, none at the end; None for one that is too long."""
    batch: list[bytes | None] = []
    num_bytes = 0
    while num_bytes < BATCH_BYTES and (line := lines.readline(MAX_LINE_BYTES)):
        num_bytes += len(line)
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            batch.append(line)
            continue
        while (rest := lines.readline(BATCH_BYTES)) and not rest.endswith(b"\n"):
            pass
        batch.append(None)
    return batch


@contextlib.contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    if name == PIPE:
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115 - closed below; its errors alone are the user's
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    with file:
        yield file


@contextlib.contextmanager
def _target(name: str) -> Iterator[BinaryIO]:
    if name == PIPE:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()  # a link stays a link
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{name}: not a regular file; write to - for a pipe")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(atomic_writer(path))
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}") from None
        yield file
