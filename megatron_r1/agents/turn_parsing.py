"""Sampled turns as chat messages: reasoning, content and tool calls of their text.

vLLM's parsers find these, in worker processes that can be killed (`ParserPool`). Turns in the
form of Hermes and Qwen, with tool calls as JSON, are parsed in this process (`HermesParser`).
`TurnReader` makes of either's result a message that the chat template can render."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
from r1_grading.base.workers import FramedProcess, WorkerLost, encode_frame

from megatron_r1.agents.continuation import Continuation, read_arguments
from megatron_r1.agents.parser_worker import ParseJob, ParseReply, ParserOptions, tool_call
from megatron_r1.base.errors import RunError, UserError
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.responses import Response

if TYPE_CHECKING:
    from megatron_r1.config import AgentsConfig


WORKER_MODULE = "megatron_r1.agents.parser_worker"
PARSE_ERROR = "tool_call_error"
"""The field of an assistant's message that says why a call stays text."""
MAX_REPLY_BYTES = 2**28
"""A reply's limit, above any turn's text. The worker runs vLLM's code, not the model's."""


@dataclass(frozen=True)
class ParsedTurn:
    """The parts of one turn.

    Attributes:
        reasoning: the reasoning, None where there is none.
        content: the answer, None where there is none.
        tool_calls: the tool calls, in OpenAI's form, arguments as JSON text.
        failure: why text that looks like a call was not parsed as one, or the parser's error; "" if
            neither. Such text is in `content`."""

    reasoning: str | None
    content: str | None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def message(self) -> dict[str, Any]:
        """Return the turn as an assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or ""}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.failure:
            message[PARSE_ERROR] = self.failure
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


OPEN_TAG, CLOSE_TAG, END_THINK = "<tool_call>", "</tool_call>", "</think>"
ARGUMENT_KEYS = ("arguments", "parameters")
"""Names of a call's arguments: Hermes', and Llama 3's."""
OTHER_KEYS = ("name", "id", "type")


class HermesParser:
    """Parses turns with `parse_hermes`, in this process, without vLLM."""

    async def check(self) -> None:
        """Do nothing: this parser needs no vLLM."""

    async def parse(self, job: ParseJob) -> ParsedTurn:
        """Return thought, content and tool calls of the job's text."""
        return parse_hermes(job.text)

    async def close(self) -> None:
        """Do nothing: there is no process to stop."""


class MalformedCall(ValueError):
    """The text after a `<tool_call>` tag begins like a call, but cannot be read as one."""


def parse_hermes(text: str) -> ParsedTurn:
    """Return the parts of a turn. Its tool calls are {"name": …, "arguments": {…}} between
    `<tool_call>` tags; the content is all other text.

    The JSON decides where a call ends, and a tag within its strings is text. Where one call is
    malformed, or repeats a key, or has one that is not known, there are no calls: the content is
    the whole text, and `failure` says why. A tag that no call follows stays in the content, with
    `failure` too."""
    reasoning, answer = _split_thought(text)
    calls: list[dict[str, Any]] = []
    pieces, start = [], 0
    try:
        for begin, end, call in _find_calls(answer):
            pieces.append(answer[start:begin])
            calls.append(call)
            start = end
    except MalformedCall as error:
        return ParsedTurn(reasoning, answer, failure=str(error))
    pieces.append(answer[start:])
    content = "\n".join(filter(None, map(str.strip, pieces))) if calls else answer
    failure = f"a {OPEN_TAG} without a call stays text" if OPEN_TAG in content else ""
    return ParsedTurn(reasoning, content, calls, failure)


def _split_thought(text: str) -> tuple[str | None, str]:
    """Return the thought before the first `</think>` that is no part of a call's JSON, and what
    follows; None and the text where there is none."""
    thought_end, json_end = -1, 0
    while (thought_end := text.find(END_THINK, thought_end + 1)) >= 0:
        while 0 <= (begin := text.find(OPEN_TAG, json_end)) < thought_end:
            json_end = _end_of_json(text, begin + len(OPEN_TAG)) or begin + len(OPEN_TAG)
        if json_end <= thought_end:
            thought = text[:thought_end].strip().removeprefix("<think>").strip()
            return thought, text[thought_end + len(END_THINK) :].lstrip()
    return None, text


def _find_calls(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (first character, end, call) of each.

    Raises:
        MalformedCall: a call is not JSON in a form that is known, or text follows its JSON.
    """
    position = 0
    while (begin := text.find(OPEN_TAG, position)) >= 0:
        position = begin + len(OPEN_TAG)
        first = _skip_space(text, position)
        if not text.startswith("{", first):
            continue  # prose about the tag
        try:
            body, end = _DECODER.raw_decode(text, first)
            call = _read_call(body)
        except (ValueError, RecursionError) as error:
            raise MalformedCall(
                f"the {OPEN_TAG} at character {begin} is malformed: {error}"
            ) from None
        position = _skip_space(text, end)
        if position < len(text):
            if not text.startswith(CLOSE_TAG, position):
                raise MalformedCall(f"text follows the JSON of the {OPEN_TAG} at character {begin}")
            position += len(CLOSE_TAG)
        yield begin, position, call


def _read_call(body: dict[str, Any]) -> dict[str, Any]:
    """Return a call in OpenAI's form.

    Raises:
        ValueError: it has unknown keys, no name, or arguments that are not an object.
    """
    if isinstance(body.get("function"), dict) and not body.keys() - {"function", "id", "type"}:
        body = body["function"]  # OpenAI's own form
    if unknown_keys := sorted(body.keys() - {*OTHER_KEYS, *ARGUMENT_KEYS}):
        raise ValueError(f"it has {unknown_keys[0]!r} besides name and arguments")
    name = body.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its name is {name!r}")
    argument_values = [body[key] for key in ARGUMENT_KEYS if body.get(key) not in (None, "")]
    if len(argument_values) > 1 and argument_values[0] != argument_values[1]:
        raise ValueError(f"it has both {' and '.join(ARGUMENT_KEYS)}")
    arguments = argument_values[0] if argument_values else {}
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"its arguments are no object but {arguments!r:.80}")
    return tool_call(
        _encodable_text(name), _encodable_text(json.dumps(arguments, ensure_ascii=False))
    )


def _end_of_json(text: str, position: int) -> int | None:
    """Return where the JSON object that begins at a position, after blanks, ends, or None."""
    first = _skip_space(text, position)
    try:
        return _DECODER.raw_decode(text, first)[1] if text.startswith("{", first) else None
    except (ValueError, RecursionError):
        return None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _finite_number(number: str) -> float:
    """Return a JSON number.

    Raises:
        ValueError: JSON cannot represent the number, as an infinity.
    """
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_with_unique_keys,
    parse_float=_finite_number,
    parse_constant=_finite_number,
    strict=True,
)


def _encodable_text(text: str) -> str:
    """Return the text with "?" for half surrogate pairs, which a model can escape in JSON."""
    return text.encode("utf-8", "replace").decode()


IN_PROCESS = ("auto", "hermes")
"""Values of `agents.tool_parser` that need no vLLM."""


class Parser(Protocol):
    """Finds reasoning and tool calls in a turn: a `HermesParser` or a `ParserPool`."""

    async def check(self) -> None:
        """Start what the parser needs, so that a wrong name is an error before the run."""

    async def parse(self, job: ParseJob) -> ParsedTurn:
        """Return thought, content and tool calls of the job's text."""

    async def close(self) -> None:
        """Stop the parser's processes."""


def find_parser(agents: AgentsConfig, tokenizer: str) -> Parser:
    """Return the parser that `agents.tool_parser` and `agents.reasoning_parser` name.

    Args:
        agents: the recipe's section.
        tokenizer: the folder of the model's tokenizer.
    """
    if agents.tool_parser in IN_PROCESS and agents.reasoning_parser is None:
        return HermesParser()
    name = {"auto": "hermes", "none": None}.get(agents.tool_parser, agents.tool_parser)
    workers = agents.parser_workers
    return ParserPool(tokenizer, name, agents.reasoning_parser, num_workers=workers)


def require_finished(response: Response) -> None:
    """Raise EngineError for a turn that neither its end token nor the token limit has ended."""
    if response.finish_reason not in ("stop", "length"):
        raise EngineError(f"an engine ended a turn with {response.finish_reason!r}")


class TurnReader:
    """Parses turns into messages that the chat template can render."""

    def __init__(self, parser: Parser, continuation: Continuation) -> None:
        self._parser, self._continuation = parser, continuation

    async def read(
        self,
        text: str,
        token_ids: Sequence[int],
        prompt_ids: Sequence[int],
        tools: Sequence[dict[str, Any]],
        max_calls: int | None = None,
    ) -> dict[str, Any]:
        """Return the assistant's message of a turn.

        Calls that the template refuses stay text in the content, as malformed calls do, among them
        calls whose arguments are no JSON object; the message's field `tool_call_error` then says
        why.

        Args:
            text: decoded from token_ids, without the end token.
            token_ids: the sampled tokens.
            prompt_ids: all tokens before them.
            tools: those that the prompt describes.
            max_calls: tool calls that are kept."""
        job = ParseJob(text, list(token_ids), list(prompt_ids), list(tools))
        message = (await self._parser.parse(job)).message()
        calls = message.get("tool_calls", [])
        if max_calls is not None and len(calls) > max_calls:
            message["tool_calls"] = calls[:max_calls]
            message[PARSE_ERROR] = f"calls after the first {max_calls} are left out, as was asked"
        if not calls and not message["content"].strip() and "reasoning_content" not in message:
            message["content"] = text  # a parser may have dropped all of it
        functions = [call["function"] for call in message.get("tool_calls", ())]
        # Parsers of vLLM keep a text or a list as arguments. No protocol has a place for these:
        # clients fail on them, or send back a call that the gateway has to refuse.
        reason = "the arguments of a call are no JSON object"
        if all(isinstance(read_arguments(function), dict) for function in functions):
            if self._continuation.can_render(message, tools):
                return message
            reason = "the chat template refuses the calls"
        return {"role": "assistant", "content": text, PARSE_ERROR: reason}
