"""Grades lines as they are read, and writes them in their order."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from r1_grading import Grade, RewardPool
from r1_grading.remote.service import ServiceError
from r1_grading.terms import RUN_ARGUMENTS, reward_arguments

from megatron_r1.base.processes.ready_input import read_when_ready
from megatron_r1.config import Config
from megatron_r1.data.table_files import describe_json_error
from megatron_r1.reporting.formatting import format_duration

RESERVED_KEYS = ("kind", "response", "truth", "reward", "reason")
MAX_OUTSTANDING_LINES = 4096
MAX_OUTSTANDING_BYTES = 64 * 2**20
"""Bounds of the lines in memory: all that are read and not yet written."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is not graded, and not kept in memory."""
BATCH_BYTES = 2**20
"""At most as much is read at a time."""
PROGRESS_SECONDS = 5.0
MAX_KINDS = 20
"""Kinds whose mean reward is shown: a line may name anything."""
FAILURES = {
    "timeouts": "timed out",
    "crashes": "crashes of a grader",
    "out_of_memory": "out of memory",
}


async def score_lines(config: Config, lines: BinaryIO, output: BinaryIO) -> LineScoring:
    """Grade lines as they are read and write them in their order. Only so many lines wait at a time
    that memory stays bounded.

    Args:
        config: the recipe; only its `rewards` and `data.kind` are read.
        lines: JSONL, read as it comes.
        output: where the graded lines are written.

    Returns:
        The counts of what was graded."""
    settings = config.rewards
    cores = len(os.sched_getaffinity(0))
    workers = settings.workers if "workers" in settings.model_fields_set else cores
    tasks: deque[tuple[asyncio.Task[Any], int]] = deque()  # each with the size of its line
    num_bytes, numbers = 0, itertools.count(1)
    try:
        async with RewardPool(workers, settings.timeout_seconds, settings.memory_bytes) as pool:
            scoring = LineScoring(pool, settings.call_options, config.data.kind)
            batches = _line_batches(lines)
            batch: list[bytes | None] | None = []
            while batch is not None:
                batch = await anext(batches, None)
                for line in batch or ():
                    task = asyncio.create_task(scoring.grade(next(numbers), line))
                    tasks.append((task, len(line or b"")))
                    num_bytes += len(line or b"")
                while tasks and (
                    batch is None
                    or len(tasks) > MAX_OUTSTANDING_LINES
                    or num_bytes > MAX_OUTSTANDING_BYTES
                ):
                    task, size = tasks.popleft()
                    num_bytes -= size
                    record, grade = await task
                    output.write(_encode_graded(record, grade))
                    scoring.add(record.get("kind"), grade)
    finally:
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
    return scoring


class LineScoring:
    """Grades lines, counts them and adds up rewards by kind; prints the progress to stderr now and
    then.

    Args:
        pool: the graders.
        options: `rewards.options`.
        kind: the kind of lines that name none."""

    def __init__(
        self, pool: RewardPool, options: dict[str, dict[str, Any]], kind: str | None
    ) -> None:
        self._pool, self._options, self._kind = pool, options, kind
        self._start = self._last_progress = time.perf_counter()
        self.num_lines = self.num_ungraded = self.num_service_failures = 0
        self.first_ungraded = self.first_service_failure = ""
        self._rewards: dict[str, tuple[float, int]] = {}

    def add(self, kind: object, grade: Grade) -> None:
        """Count one line."""
        self.num_lines += 1
        if not grade.is_graded:
            self.num_ungraded += 1
            self.first_ungraded = self.first_ungraded or grade.reason
        elif isinstance(kind, str) and (kind in self._rewards or len(self._rewards) < MAX_KINDS):
            total, count = self._rewards.get(kind, (0.0, 0))
            self._rewards[kind] = (total + grade.reward, count + 1)
        timestamp = time.perf_counter()
        if timestamp - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = timestamp
            rate = self.num_lines / (timestamp - self._start)
            print(f"score: {self.num_lines:,} lines, {rate:,.0f}/s", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Return the counts of lines, mean rewards by kind, failures and seconds, and on a second
        line why the first ungraded line could not be graded."""
        counts = self._pool.snapshot()
        parts = [
            f"{self.num_lines:,} lines",
            f"{self.num_lines - self.num_ungraded:,} graded",
            f"{self.num_ungraded:,} could not be graded",
            *(f"{counts[name]:,} {noun}" for name, noun in FAILURES.items()),
        ]
        means = [
            f"{kind} {total / count:.3f} ({count:,})"
            for kind, (total, count) in sorted(self._rewards.items())
        ]
        seconds = format_duration(time.perf_counter() - self._start)
        line = f"score: {', '.join(parts)}; mean reward {', '.join(means) or '-'}; {seconds}"
        if self.num_ungraded:
            line += f"\nscore: the first of these: {self.first_ungraded}"
        return line

    async def grade(self, number: int, line: bytes | None) -> tuple[dict[str, Any], Grade]:
        """Return the line's fields and its grade; a line that is no record is a field itself."""
        if line is None:
            return {}, Grade.ungraded(f"line {number} is longer than {MAX_LINE_BYTES:,} bytes")
        if not (stripped := line.strip()):
            return {"line": ""}, Grade.ungraded(f"line {number} is blank")
        try:
            record = json.loads(stripped)
        except (ValueError, RecursionError) as error:
            text = line.decode("utf-8", "replace")
            fault = describe_json_error(error)
            return {"line": text}, Grade.ungraded(f"line {number} is not JSON: {fault}")
        if not isinstance(record, dict):
            return {"line": record}, Grade.ungraded(f"line {number} is not an object")
        if self._kind is not None:
            record.setdefault("kind", self._kind)
        return record, await self._grade_record(record)

    async def _grade_record(self, record: dict[str, Any]) -> Grade:
        for name in ("kind", "response"):
            if not isinstance(record.get(name), str):
                fault = "it is missing"
                if name in record:
                    fault = f"must be a string, not {type(record[name]).__name__}"
                remedy = "; set --data.kind, as math, for lines without it" * (name == "kind")
                return Grade.ungraded(f"{name!r}: {fault}{remedy}")
        if isinstance(record.get("opened"), bool):  # it would count for nothing
            return Grade.ungraded("'opened' is called 'thought_opened'")
        kind, truth = record["kind"], record.get("truth")
        fields = {name: value for name, value in record.items() if name not in RESERVED_KEYS}
        run_arguments = {name: fields.pop(name) for name in RUN_ARGUMENTS if name in fields}
        try:
            arguments = reward_arguments(kind, self._options, fields, run_arguments)
            return await self._pool.grade(kind, record["response"], truth, **arguments)
        except ServiceError as error:
            self.num_service_failures += 1
            self.first_service_failure = self.first_service_failure or str(error)
            return Grade.ungraded(error)
        except (ValueError, RecursionError) as error:
            return Grade.ungraded(error)


def _encode_graded(record: dict[str, Any], grade: Grade) -> bytes:
    fields = {name: value for name, value in record.items() if name not in ("reward", "reason")}
    result = {"reward": grade.reward, "reason": grade.reason}
    try:
        return (json.dumps(fields | result, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot encode but an escape can
        return (json.dumps(fields | result) + "\n").encode()
    except RecursionError:
        return (json.dumps(result) + "\n").encode()


async def _line_batches(lines: BinaryIO) -> AsyncIterator[list[bytes | None]]:
    """Yield the lines, without their line breaks, of what is read at a time; None stands for a line
    that is too long."""
    line = bytearray()

    def take_line() -> bytes | None:
        text = bytes(line) if len(line) < MAX_LINE_BYTES else None
        line.clear()
        return text

    while chunk := await read_when_ready(lines.fileno(), BATCH_BYTES):
        *ends, beginning = chunk.split(b"\n")
        batch = []
        for end in ends:
            line += end
            batch.append(take_line())
        line += beginning[: max(0, MAX_LINE_BYTES - len(line))]
        yield batch
    if line:
        yield [take_line()]
