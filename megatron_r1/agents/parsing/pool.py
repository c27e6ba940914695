"""Parses turns with vLLM's parsers, in worker processes that can be killed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from r1_grading.base.workers import FramedProcess, WorkerLost, frame

from megatron_r1.agents.parsing.worker import Options, ParseJob, ParseReply
from megatron_r1.base.errors import RunError, UserError

MODULE = "megatron_r1.agents.parsing.worker"
FAILURE = "tool_call_error"
"""The field of an assistant's message that says why a call stays text."""
MAX_REPLY_BYTES = 2**28
"""A reply's limit, above any answer's text. The worker runs vLLM's code, not the model's."""


@dataclass(frozen=True)
class Parsed:
    """The parts of one turn. tool_calls: in OpenAI's form, arguments as JSON text."""

    reasoning: str | None
    content: str | None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    """Why text that may have been meant as a call is none, or the parser's error; "" if there is
    nothing to say. Such text is in `content`."""

    def message(self) -> dict[str, Any]:
        """Return the turn as an assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or ""}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.failure:
            message[FAILURE] = self.failure
        return message


class ParserPool:
    """Worker processes with one pair of parsers. They start with the first `parse` or `check`, and
    end with the calling thread. Without parsers a turn is all content, and no process starts."""

    def __init__(
        self,
        tokenizer: str,
        tool_parser: str | None,
        reasoning_parser: str | None,
        *,
        num_workers: int = 2,
        timeout_seconds: float = 30.0,
    ) -> None:
        """tokenizer: its folder. tool_parser, reasoning_parser: vLLM's names, None for no parser.
        timeout_seconds: for one turn; a worker that takes longer is killed."""
        self._has_parsers = bool(tool_parser or reasoning_parser)
        self._options = Options(tokenizer, tool_parser or "", reasoning_parser or "")
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[FramedProcess[ParseReply]] = []
        self._all: set[FramedProcess[ParseReply]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def check(self) -> None:
        """Start a worker. Raises UserError where vLLM has no such parser or refuses the
        tokenizer."""
        await self.parse(ParseJob("", [], []))

    async def parse(self, job: ParseJob) -> Parsed:
        """Return what a turn contains.

        A parser that raises, hangs or ends its process leaves a turn that is all content. Raises
        UserError as `check`, and RunError where no worker can be started."""
        if not self._has_parsers:
            return Parsed(None, job.text)
        message = frame(job)
        async with self._slots:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    worker.send(message)
                    reply = await worker.receive()
            except BaseException as error:
                self._all.discard(worker)
                await worker.kill()
                if not isinstance(error, (WorkerLost, TimeoutError)):
                    raise
                ending = worker.last_words or type(error).__name__
                reply = ParseReply("failed", f"the parser's process was lost: {ending}")
            else:
                self._idle.append(worker)
        if reply.status != "parsed":
            return Parsed(None, job.text, failure=reply.reason)
        return Parsed(reply.reasoning, reply.content, reply.tool_calls, reply.reason)

    async def close(self) -> None:
        """Kill the workers. Safe to call again."""
        workers, self._all, self._idle = self._all, set(), []
        await asyncio.gather(*(worker.kill() for worker in workers))

    async def _start(self) -> FramedProcess[ParseReply]:
        arguments = [msgspec.json.encode(self._options).decode()]
        try:
            worker = await FramedProcess[ParseReply].launch(
                MODULE, arguments, ParseReply, MAX_REPLY_BYTES
            )
        except WorkerLost as error:
            raise RunError(f"a parser worker did not start: {error}") from None
        if worker.greeting and worker.greeting.status == "unusable":
            await worker.kill()
            raise UserError(
                f"{self._named()} cannot be used: {worker.greeting.reason}",
                key=worker.greeting.key,
                cause=worker.greeting.cause,
            )
        self._all.add(worker)
        return worker

    def _named(self) -> str:
        tool, reasoning = self._options.tool_parser, self._options.reasoning_parser
        return f"agents.tool_parser {tool or 'none'}, agents.reasoning_parser {reasoning or 'none'}"
