"""From all answers on disk to decisions and output files: streaming, and the same every time.

Sampling and deciding are two passes, so that another filter or another share is decided in minutes
about answers that took days.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.curation.answer_log import AnswerLog
from megatron_r1.curation.candidate import Candidate, from_line
from megatron_r1.curation.selection import Decision
from megatron_r1.data.prompts import Prompt
from megatron_r1.files import atomic_writer
from megatron_r1.files.jsonl import strict

WINDOW = 64
"""Questions that are decided upon at once."""
NOT_ASKED = "not_asked"
"""Of answers to questions that the recipe no longer has, or beyond its number of them."""


@dataclass(frozen=True)
class Curated:
    """decisions: one for each candidate; rows: lines for the output."""

    decisions: Sequence[Decision]
    rows: Sequence[Mapping[str, Any]]


Curate = Callable[[Prompt, Sequence[Candidate]], Awaitable[Curated]]


async def curate_all(
    log: AnswerLog, prompts: Sequence[Prompt], num_samples: int, curate: Curate
) -> AsyncIterator[tuple[list[dict[str, Any]], Curated]]:
    """(lines of samples.jsonl, what is decided) of every question, in the order of `prompts`."""
    groups = zip(prompts, log.groups((prompt.id for prompt in prompts), num_samples), strict=True)

    async def one(group: tuple[Prompt, list[dict[str, Any]]]) -> Curated:
        prompt, lines = group
        return await curate(prompt, [from_line(line) for line in lines])

    async with contextlib.aclosing(_in_order(groups, one)) as decided:
        async for (_, lines), curated in decided:
            yield lines, curated


async def write_all(
    log: AnswerLog,
    prompts: Sequence[Prompt],
    num_samples: int,
    curate: Curate,
    output: Path | None,
    count: Callable[[Mapping[str, Any], Decision], None],
) -> None:
    """Write `output`, and samples.jsonl anew with every decision; both appear whole or not at all.

    count: told of every answer's line and what became of it.
    """
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(atomic_writer(output)) if output else None
        samples = stack.enter_context(atomic_writer(log.path))
        async for lines, curated in curate_all(log, prompts, num_samples, curate):
            for line, decision in zip(lines, curated.decisions, strict=True):
                count(line, decision)
                decided = line | {"decision": decision.code, "why": decision.why}
                samples.write(_encode(decided))
            if kept is not None:
                kept.writelines(map(_encode, curated.rows))
        for line in log.others({prompt.id for prompt in prompts}, num_samples):
            samples.write(_encode(line | {"decision": NOT_ASKED, "why": ""}))


async def _in_order(
    items: Iterable[Any], work: Callable[[Any], Awaitable[Any]]
) -> AsyncIterator[tuple[Any, Any]]:
    """(item, its result) in the order of `items`, with WINDOW of them under way."""
    under_way: deque[tuple[Any, asyncio.Task[Any]]] = deque()
    try:
        for item in items:
            under_way.append((item, asyncio.ensure_future(work(item))))
            if len(under_way) == WINDOW:
                first, task = under_way.popleft()
                yield first, await task
        while under_way:
            first, task = under_way.popleft()
            yield first, await task
    finally:
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(strict(record), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="replace")
