"""Parses turns by vLLM's parsers, in worker processes that can be killed (`parser_worker`)."""

from __future__ import annotations

import asyncio
from typing import Self

import msgspec
from r1_grading.base.workers import FramedProcess, WorkerLost, encode_frame

from megatron_r1.agents.parsed_turn import ParsedTurn
from megatron_r1.agents.parser_worker import ParseJob, ParseReply, ParserOptions
from megatron_r1.base.errors import RunError, UserError

WORKER_MODULE = "megatron_r1.agents.parser_worker"
MAX_REPLY_BYTES = 2**28
"""A reply's limit, above any turn's text. The worker runs vLLM's code, not the model's."""


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
        """Prepare workers, which start with the first turn.

        Args:
            tokenizer: the tokenizer's folder.
            tool_parser: vLLM's name, None for no parser.
            reasoning_parser: vLLM's name, None for no parser.
            num_workers: the number of processes.
            timeout_seconds: the time for one turn; a worker that takes longer is killed."""
        self._has_parsers = bool(tool_parser or reasoning_parser)
        self._options = ParserOptions(tokenizer, tool_parser or "", reasoning_parser or "")
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[FramedProcess[ParseReply]] = []
        self._all: set[FramedProcess[ParseReply]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def check(self) -> None:
        """Start a worker.

        Raises:
            UserError: vLLM has no such parser, or the parser refuses the tokenizer.
        """
        await self.parse(ParseJob("", [], []))

    async def parse(self, job: ParseJob) -> ParsedTurn:
        """Return what a turn contains.

        A parser that raises, hangs or ends its process leaves a turn that is all content.

        Raises:
            UserError: vLLM has no such parser, or the parser refuses the tokenizer.
            RunError: no worker can be started.
        """
        if not self._has_parsers:
            return ParsedTurn(None, job.text)
        message = encode_frame(job)
        async with self._slots:
            worker = self._idle.pop() if self._idle else await self._start_worker()
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
            return ParsedTurn(None, job.text, failure=reply.reason)
        return ParsedTurn(reply.reasoning, reply.content, reply.tool_calls, reply.reason)

    async def close(self) -> None:
        """Kill the workers. Safe to call again."""
        workers, self._all, self._idle = self._all, set(), []
        await asyncio.gather(*(worker.kill() for worker in workers))

    async def _start_worker(self) -> FramedProcess[ParseReply]:
        arguments = [msgspec.json.encode(self._options).decode()]
        try:
            worker = await FramedProcess[ParseReply].launch(
                WORKER_MODULE, arguments, ParseReply, MAX_REPLY_BYTES
            )
        except WorkerLost as error:
            raise RunError(f"a parser worker did not start: {error}") from None
        if worker.greeting and worker.greeting.status == "unusable":
            await worker.kill()
            raise UserError(
                f"{self._parser_names()} cannot be used: {worker.greeting.reason}",
                key=worker.greeting.key,
                cause=worker.greeting.cause,
            )
        self._all.add(worker)
        return worker

    def _parser_names(self) -> str:
        tool, reasoning = self._options.tool_parser, self._options.reasoning_parser
        return f"agents.tool_parser {tool or 'none'}, agents.reasoning_parser {reasoning or 'none'}"
