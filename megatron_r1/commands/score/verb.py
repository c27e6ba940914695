"""`megatron-r1 score IN.jsonl OUT.jsonl`: grades every line by the reward it names.

    {"kind": "math", "response": "…", "truth": "13"}  →  the same with "reward" and "reason"

`--data.kind math` is the kind of lines that name none. As many lines come out as went in, in their
order; a line that cannot be graded gets reward 0 and the reason.

`megatron-r1 score --audit GRADED.jsonl` reads graded lines instead, or the logged steps of a run
whose folder is given, and estimates how many are wrongly rejected or accepted, by a second reader
on a random sample of --size responses (200), per data source (docs/rewards.md). --groups questions
(25) are judged whole, for the change of advantages. `--verifier math-verify` is for verdicts that
math-verify gave, which the second reader then does not ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import stat
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from r1_grading import Grade, RewardPool
from r1_grading.remote.service import ServiceError
from r1_grading.rewards import resolve_reward
from r1_grading.terms import RUN_ARGUMENTS, reward_arguments

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.files import atomic_writer
from megatron_r1.base.processes.stopping import read_when_ready
from megatron_r1.commands.score import audit_option
from megatron_r1.config import Config
from megatron_r1.data.table_files import describe_json_error
from megatron_r1.reporting.formatting import format_duration

ARGUMENTS = ("IN.jsonl", "OUT.jsonl")
SETTINGS = ("rewards", "data.kind")
OPTIONS = {
    "audit": "GRADED.jsonl|RUN",
    "size": "N",
    "groups": "N",
    "seed": "N",
    "verifier": "NAME",
    "json": "FILE",
}
ALTERNATIVE_OPTIONS = ("audit",)
PIPE = "-"
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


def run(
    config: Config, source: str = "", target: str = "", audit: str | None = None, **options: str
) -> None:
    """Grade `source` into `target`, "-" for a pipe, and print one line of summary; or audit a file.

    Uses every core unless `rewards.workers` is given. `target` appears when all lines are graded.
    `audit_option.run` has the errors of an audit.

    Args:
        config: the settings given on the command line.
        source: the JSONL file to grade.
        target: the file to write.
        audit: a graded file, or a run's folder, whose rewards are audited instead.
        **options: those of an audit, by name.

    Raises:
        UserError: the source cannot be read, or the target cannot be written.
        RunError: no worker can be started, or the reader of the output has ended. After all lines
            are written: a served model failed, or no line could be graded, as such zeros should not
            be trained on."""
    if audit is not None:
        audit_option.run(config, audit, **options)
        return
    if options:
        name = f"--{next(iter(options))}"
        raise UserError(
            f"{name} belongs to an audit: megatron-r1 score --audit GRADED.jsonl {name} …",
            key=name,
            cause=Cause.CONFLICT,
        )
    _check_files(config, source, target)
    try:
        with _open_source(source) as lines, _open_target(target) as output:
            scoring = asyncio.run(_score_lines(config, lines, output))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again at exit
        raise RunError("the reader of the output has ended") from None
    print(scoring.summary(), file=sys.stderr if target == PIPE else sys.stdout)
    if scoring.num_service_failures:
        raise RunError(
            f"reward 0 because a service failed, lines: {scoring.num_service_failures:,}; the "
            f"first of them: {scoring.first_service_failure}"
        )
    if scoring.num_lines and scoring.num_ungraded == scoring.num_lines:
        raise RunError(
            f"{target}: none of the {scoring.num_lines:,} lines could be graded; the first: "
            f"{scoring.first_ungraded}"
        )


async def _score_lines(config: Config, lines: BinaryIO, output: BinaryIO) -> _Scoring:
    """Grade lines as they are read and write them in their order. Only so many lines wait at a time
    that memory stays bounded. Returns the counts."""
    settings = config.rewards
    cores = len(os.sched_getaffinity(0))
    workers = settings.workers if "workers" in settings.model_fields_set else cores
    tasks: deque[tuple[asyncio.Task[Any], int]] = deque()  # each with the size of its line
    num_bytes, numbers = 0, itertools.count(1)
    try:
        async with RewardPool(workers, settings.timeout_seconds, settings.memory_bytes) as pool:
            scoring = _Scoring(pool, settings.call_options, config.data.kind)
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


class _Scoring:
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


def _check_files(config: Config, source: str, target: str) -> None:
    """Raise UserError for an unknown `data.kind`, or a target that is the source: its rewards would
    be lost."""
    if config.data.kind is not None:
        try:
            resolve_reward(config.data.kind)
        except UserError as error:
            raise UserError(f"data.kind: {error}", key="data.kind", cause=error.cause) from None
    is_pipe = PIPE in (source, target)
    if not is_pipe and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(
            f"{target}: it is {ARGUMENTS[0]}, whose own rewards would be lost; write to another "
            "file",
            key=ARGUMENTS[1],
            cause=Cause.CONFLICT,
        )


def _open_source(name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if name == PIPE:
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(name, "rb")
    except OSError as error:
        raise UserError(
            f"{name}: {error.strerror} (relative to {Path.cwd()})",
            key=ARGUMENTS[0],
            cause=Cause.UNREADABLE,
        ) from None


@contextlib.contextmanager
def _open_target(name: str) -> Iterator[BinaryIO]:
    if name == PIPE:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()  # a link stays a link
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UserError(
            f"{name}: not a regular file; write to - for a pipe",
            key=ARGUMENTS[1],
            cause=Cause.UNSUPPORTED,
        )
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(atomic_writer(path))
        except OSError as error:
            raise UserError(
                f"{name}: {error.strerror}", key=ARGUMENTS[1], cause=Cause.UNREADABLE
            ) from None
        yield file
