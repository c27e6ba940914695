"""A parser worker: `python -m megatron_r1.agents.parser_worker OPTIONS`, OPTIONS a JSON
`ParserOptions`.

Loads the tokenizer and vLLM's parsers (seconds), then reads jobs from stdin and writes replies to
the original stdout, both as frames of JSON (`r1_grading.base.workers`). The controller imports no
vLLM, and a parser that hangs on what a model wrote can be killed here."""

import os
import sys
from typing import Any, Literal

import msgspec
from r1_grading.base.workers import LENGTH_HEADER, encode_frame, private_streams

from megatron_r1.agents.dropped_text import find_dropped_text
from megatron_r1.agents.parsed_turn import tool_call
from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.processes.children import end_without_parent


class ParserOptions(msgspec.Struct):
    """The parsers of a worker.

    Attributes:
        tokenizer: the folder of the model's tokenizer.
        tool_parser: vLLM's name of the parser of calls, "" for none.
        reasoning_parser: vLLM's name of the parser of reasoning, "" for none."""

    tokenizer: str
    tool_parser: str
    reasoning_parser: str


class ParseJob(msgspec.Struct):
    """One sampled turn.

    Attributes:
        text: decoded from token_ids, without the closing token.
        token_ids: the sampled tokens.
        prompt_token_ids: all tokens before it; a template may have opened a thought there.
        tools: the tools, in OpenAI's form."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    tools: list[dict[str, Any]] = []


class ParseReply(msgspec.Struct):
    """The parts of a turn, its calls in OpenAI's form, or the state of the worker.

    Attributes:
        status: "ready": the worker has loaded the parsers; "unusable": it cannot load them, and
            ends; "parsed": the turn's parts follow; "failed": the parser raised.
        reason: what is wrong; of "parsed", what the parser dropped of the turn, whose whole text is
            content then; "" for nothing.
        reasoning: the reasoning, None where there is none.
        content: the answer, None where there is none.
        tool_calls: the calls, in OpenAI's form.
        key: the setting at fault, of "unusable".
        cause: the kind of its fault."""

    status: Literal["ready", "unusable", "parsed", "failed"]
    reason: str = ""
    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] = []
    key: str = ""
    cause: Cause = Cause.FAILED


def main(options: ParserOptions) -> None:
    """Serve jobs until stdin ends."""
    end_without_parent()
    jobs, replies = private_streams()

    def send(reply: ParseReply) -> None:
        replies.write(encode_frame(reply))
        replies.flush()

    try:
        parser = TurnParser(options)
    except Exception as error:  # noqa: BLE001 - vLLM may raise anything for a bad name
        if not isinstance(error, UserError):
            key = "agents.tool_parser" if options.tool_parser else "agents.reasoning_parser"
            error = UserError(f"{type(error).__name__}: {error}", key=key, cause=Cause.FAILED)
        send(ParseReply("unusable", reason=str(error), key=error.key, cause=error.cause))
        return
    send(ParseReply("ready"))
    decoder = msgspec.json.Decoder(ParseJob)
    while header := jobs.read(LENGTH_HEADER.size):
        job = decoder.decode(jobs.read(LENGTH_HEADER.unpack(header)[0]))
        try:
            send(parser.parse(job))
        except Exception as error:  # noqa: BLE001 - a parser may raise anything on wild text
            send(ParseReply("failed", reason=f"{type(error).__name__}: {error}"))


class TurnParser:
    """vLLM's reasoning and tool parsers for one tokenizer."""

    def __init__(self, options: ParserOptions) -> None:
        """Raise what vLLM raises where there is no such parser or it refuses the tokenizer."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        from megatron_r1.data.tokenizer import load_tokenizer

        _require_parser("tool", options.tool_parser, ToolParserManager.list_registered())
        _require_parser(
            "reasoning", options.reasoning_parser, ReasoningParserManager.list_registered()
        )
        self._request = ChatCompletionRequest
        self._tokenizer = load_tokenizer(options.tokenizer, "model.path")
        self._parser = ParserManager.get_parser(
            tool_parser_name=options.tool_parser or None,
            reasoning_parser_name=options.reasoning_parser or None,
            enable_auto_tools=True,
            tokenizer=self._tokenizer,
        )
        assert self._parser is not None, "a pool without parsers starts no worker"

    def parse(self, job: ParseJob) -> ParseReply:
        """Split a sampled turn into its reasoning, content and tool calls; all of it is content
        where the parser drops a part.

        Raises:
            Exception: what vLLM's parser raises.
        """
        message = {"role": "user", "content": ""}  # parsers read the tools only
        request = self._request(model="", messages=[message], tools=job.tools or None)
        parser = self._parser(self._tokenizer, request.tools, chat_template_kwargs={})
        parser.set_prompt_token_ids(job.prompt_token_ids)
        reasoning, content, calls = parser.parse(
            job.text, request, enable_auto_tools=True, model_output_token_ids=job.token_ids
        )
        tool_calls = [tool_call(call.name, call.arguments, call.id) for call in calls or []]
        if lost_text := find_dropped_text(job.text, reasoning, content, tool_calls):
            return ParseReply("parsed", reason=lost_text, content=job.text)
        return ParseReply("parsed", reasoning=reasoning, content=content, tool_calls=tool_calls)


def _require_parser(kind: str, name: str, names: list[str]) -> None:
    if name and name not in names:
        raise UserError(
            f"agents.{kind}_parser: vLLM has no {kind} parser {name!r}{did_you_mean(name, names)}",
            key=f"agents.{kind}_parser",
            cause=Cause.UNKNOWN,
        )


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=ParserOptions))
