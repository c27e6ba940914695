"""Text of a turn that a parser of vLLM put into neither reasoning, content nor a call.

Parsers differ in what they do with malformed calls: some leave them in the content, some drop the
tag, the call or all that stands behind it. The forms differ too, so words are compared: every word
of the turn, but those of the markup, stands in one of the parts."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

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
