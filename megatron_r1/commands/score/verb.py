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
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from r1_grading.rewards import resolve_reward

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.files import atomic_writer
from megatron_r1.commands.score import audit_option
from megatron_r1.commands.score.line_scoring import score_lines
from megatron_r1.config import Config

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
            scoring = asyncio.run(score_lines(config, lines, output))
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
