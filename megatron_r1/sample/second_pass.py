"""The second pass of `sample`, which decides about all logged responses and writes them.

It runs without engines: other filters or shares are decided in minutes about responses that took
days. The same responses give the same files."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.base.files import atomic_writer
from megatron_r1.base.files.json_lines import to_strict_json
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.sample.selection import Decision

WINDOW = 64
"""Prompts that are decided on concurrently."""
NOT_ASKED_DECISION = "not_asked"
"""The decision about responses to prompts that the recipe no longer has, or beyond `samples`."""

OUTPUT_FILES = {"sft": "sft.jsonl", "pairs": "pairs.jsonl", "labels": "labels.jsonl"}
"""The file of each `sample.output` that has one."""


@dataclass(frozen=True)
class PromptResult:
    """The decisions about one prompt and the rows written for it.

    Attributes:
        decisions: one for each of a prompt's responses.
        rows: lines of the output file."""

    decisions: Sequence[Decision]
    rows: Sequence[Mapping[str, Any]]


Decide = Callable[[Prompt, Sequence[TextResponse]], Awaitable[PromptResult]]


async def decide_all(
    log: ResponseLog, prompt_set: PromptSet, decide: Decide
) -> AsyncGenerator[tuple[list[dict[str, Any]], PromptResult], None]:
    """Yield (lines of samples.jsonl, result) of every prompt in order, WINDOW in progress.

    Args:
        log: the logged responses.
        prompt_set: the prompts and the number of their samples.
        decide: decides about the responses of one prompt."""
    pending: deque[tuple[list[dict[str, Any]], asyncio.Future[PromptResult]]] = deque()
    lines_by_prompt = log.read(map(prompt_set.key, prompt_set.prompts), prompt_set.num_samples)
    try:
        for prompt, lines in zip(prompt_set.prompts, lines_by_prompt, strict=True):
            responses = [TextResponse.from_line(line) for line in lines]
            pending.append((lines, asyncio.ensure_future(decide(prompt, responses))))
            if len(pending) == WINDOW:
                first, result = pending.popleft()
                yield first, await result
        while pending:
            first, result = pending.popleft()
            yield first, await result
    finally:
        for _, result in pending:
            result.cancel()
        await asyncio.gather(*(result for _, result in pending), return_exceptions=True)


async def write_outputs(
    log: ResponseLog,
    prompt_set: PromptSet,
    decide: Decide,
    output: Path | None,
    count: Callable[[Mapping[str, Any], Decision], None],
) -> None:
    """Write `output`, and samples.jsonl anew with every decision; both whole or not at all.

    Args:
        log: the sampled responses.
        prompt_set: the prompts.
        decide: returns the decisions about a prompt's responses.
        output: the file that is trained on; None: only samples.jsonl.
        count: called with every response's line and the decision about it."""
    keys = {prompt_set.key(prompt) for prompt in prompt_set.prompts}
    async with contextlib.AsyncExitStack() as stack:
        kept_file = stack.enter_context(atomic_writer(output)) if output else None
        samples = stack.enter_context(atomic_writer(log.path))
        results = decide_all(log, prompt_set, decide)
        await stack.enter_async_context(contextlib.aclosing(results))
        async for lines, result in results:
            for line, decision in zip(lines, result.decisions, strict=True):
                count(line, decision)
                samples.write(
                    _encode_record(line | {"decision": decision.code, "why": decision.why})
                )
            if kept_file is not None:
                kept_file.writelines(map(_encode_record, result.rows))
        for line in log.read_others(keys, prompt_set.num_samples):
            samples.write(_encode_record(line | {"decision": NOT_ASKED_DECISION, "why": ""}))


def _encode_record(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(to_strict_json(record), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="replace")
