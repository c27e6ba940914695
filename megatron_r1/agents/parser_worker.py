"""A parser worker: `python -m megatron_r1.agents.parser_worker OPTIONS`, OPTIONS a JSON
`ParserOptions`.

Loads the tokenizer and vLLM's parsers (seconds), then reads jobs from stdin and writes replies to
the original stdout, both as frames of JSON (`r1_grading.base.workers`). The controller imports no
vLLM, and a parser that hangs on what a model wrote can be killed here.

`find_dropped_text` finds text of a turn that a parser of vLLM put into neither reasoning, content
nor a call. Their parsers differ in what they do with malformed calls: some leave them in the
content, some drop the tag, the call or all that stands behind it. The forms differ too, so words
are compared: every word of the turn, but those of the markup, stands in one of the parts."""

import json
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from r1_grading.base.workers import LENGTH_HEADER, encode_frame, private_streams

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.processes.children import end_without_parent

_TAG = re.compile(r"</?[^<>\s=]+([=\s][^<>]*)?>|\[/?[A-Z_]{3,}\]")
_TOOL_TAG = re.compile(r"<[^<>/\s]*(?:tool|func|invoke|call)[^<>]*>|\[TOOL_CALLS?\]", re.IGNORECASE)
_KIMI_ID = re.compile(r"\bfunctions\.([\w.-]+):\d+")
_GRANITE = re.compile(r"\bHere(?:'s| is) my (?:thought process|response):")
"""What stands around thoughts of Granite models instead of tags."""
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_MARKUP = {
    "name",
    "names",
    "arguments",
    "argument",
    "parameters",
    "parameter",
    "params",
    "args",
    "arg",
    "type",
    "function",
    "functions",
    "id",
    "index",
    "tool",
    "tools",
    "call",
    "calls",
    "invoke",
    "key",
    "value",
    "json",
    "string",
    "object",
    "number",
    "integer",
    "boolean",
    "array",
    "true",
    "false",
    "null",
    "none",
    "to",
    "analysis",
    "commentary",
    "final",
    "assistant",
    "recipient",
    "constrain",
    "functools",
    "code",
    "python",
    "ipython",
    "response",
    "channel",
    "message",
}
"""Words, in lower case, that forms of calls have besides the call's own."""


def find_dropped_text(
    text: str, reasoning: str | None, content: str | None, calls: Sequence[dict[str, Any]]
) -> str:
    """Return a sentence on what of `text` is in no part, "" where everything is.

    Args:
        text: the whole text of a turn.
        reasoning: the part that is reasoning, None where there is none.
        content: the part that is the answer, None where there is none.
        calls: the tool calls, in OpenAI's form."""
    kept_text = f"{reasoning or ''} {content or ''}"
    if not calls and (tag := _TOOL_TAG.search(text)) and tag[0] not in kept_text:
        return f"{tag[0]} begins no call that can be read"
    if not calls and _strip_tags_and_spaces(text) == _strip_tags_and_spaces(kept_text):
        return ""
    tool_names = [call["function"]["name"] for call in calls]
    values = [_decode_arguments(call["function"]["arguments"]) for call in calls]
    leaves = [leaf for value in values for leaf in _keys_and_leaf_values(value)]
    has_numbers = any(isinstance(leaf, (int, float)) for leaf in leaves)
    dropped_words = Counter(_split_into_words(_without_tags(text)))
    dropped_words -= Counter(
        _split_into_words(_without_tags(" ".join([kept_text, *tool_names, *map(str, leaves)])))
    )
    for word in dropped_words:
        if word.lower() not in _MARKUP and not (has_numbers and _is_number(word)):
            return f"{word!r} is in no call that can be read, and in no other part"
    return ""


def _decode_arguments(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _keys_and_leaf_values(value: Any) -> Iterator[Any]:
    """Yield the keys and the values that hold no others."""
    pending_values = [value]
    while pending_values:
        value = pending_values.pop()
        if isinstance(value, dict):
            yield from value
            pending_values += value.values()
        elif isinstance(value, list):
            pending_values += value
        else:
            yield value


def _without_tags(text: str) -> str:
    """Return the text without escapes and without the names of tags, but with their attributes."""
    text = _GRANITE.sub(" ", _KIMI_ID.sub(lambda match: match[1], text))
    text = _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else " ", text)
    return _TAG.sub(lambda match: f" {match[1] or ''} ", text)


def _strip_tags_and_spaces(text: str) -> str:
    """Return the text without tags and spaces: a special token that is dropped joins two words."""
    return "".join(_without_tags(text).split())


def _split_into_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


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


def tool_call(name: str, arguments: str, call_id: str | None = None) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, with a new id where it has none.

    Args:
        name: the tool's name.
        arguments: the call's arguments, as JSON.
        call_id: the call's id; None: a new one is made."""
    function = {"name": name, "arguments": arguments}
    call_id = call_id or f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": function}


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
