"""Finds text of a turn that a parser of vLLM put into neither reasoning, content nor a call.

Their parsers differ in what they do with malformed calls: some leave them in the content, some drop
the tag, the call or all that stands behind it. The forms differ too, so words are compared: every
word of the turn, but those of the markup, stands in one of the parts."""

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
    *("name", "names", "arguments", "argument", "parameters", "parameter"),
    *("params", "args", "arg", "type", "function", "functions", "id", "index"),
    *("tool", "tools", "call", "calls"),
    *("invoke", "key", "value", "json", "string", "object", "number", "integer"),
    *("boolean", "array", "true", "false", "null", "none", "to", "analysis"),
    *("commentary", "final", "assistant", "recipient", "constrain", "functools"),
    *("code", "python", "ipython", "response", "channel", "message"),
}
"""Words, in lower case, that forms of calls have besides the call's own."""


def left_out(
    text: str, reasoning: str | None, content: str | None, calls: Sequence[dict[str, Any]]
) -> str:
    """Return a sentence on what of `text` is in no part, "" where everything is. calls: in OpenAI's
    form."""
    kept = f"{reasoning or ''} {content or ''}"
    if not calls and (tag := _TOOL_TAG.search(text)) and tag[0] not in kept:
        return f"{tag[0]} begins no call that can be read"
    if not calls and _letters(text) == _letters(kept):
        return ""
    named = [call["function"]["name"] for call in calls]
    values = [_value(call["function"]["arguments"]) for call in calls]
    leaves = [leaf for value in values for leaf in _leaves(value)]
    has_numbers = any(isinstance(leaf, (int, float)) for leaf in leaves)
    rest = Counter(_words(_without_tags(text)))
    rest -= Counter(_words(_without_tags(" ".join([kept, *named, *map(str, leaves)]))))
    for word in rest:
        if word.lower() not in _MARKUP and not (has_numbers and _is_number(word)):
            return f"{word!r} is in no call that can be read, and in no other part"
    return ""


def _value(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and the values that hold no others."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        else:
            yield value


def _without_tags(text: str) -> str:
    """Return the text without escapes and without the names of tags, but with their attributes."""
    text = _GRANITE.sub(" ", _KIMI_ID.sub(lambda found: found[1], text))
    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else " ", text)
    return _TAG.sub(lambda found: f" {found[1] or ''} ", text)


def _letters(text: str) -> str:
    """Return the text without tags and spaces: a special token that is dropped joins two words."""
    return "".join(_without_tags(text).split())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
