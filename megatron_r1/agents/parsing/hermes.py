"""Parses answers in the form of Hermes and Qwen: reasoning, content, tool calls as JSON."""

import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_r1.agents.parsing.pool import Parsed
from megatron_r1.agents.parsing.worker import ParseJob, tool_call

OPEN, CLOSE, END_THINK = "<tool_call>", "</tool_call>", "</think>"
ARGUMENTS = ("arguments", "parameters")
"""Names of a call's arguments: Hermes', and Llama 3's."""
OTHER_KEYS = ("name", "id", "type")


class HermesParser:
    """Parses answers with `parse_hermes`, in this process, without vLLM."""

    async def check(self) -> None:
        pass

    async def parse(self, job: ParseJob) -> Parsed:
        return parse_hermes(job.text)

    async def close(self) -> None:
        pass


class Malformed(ValueError):
    """The text behind a tag begins as a call and is none."""


def parse_hermes(text: str) -> Parsed:
    """Return the parts of an answer. Its tool calls are {"name": …, "arguments": {…}} between
    `<tool_call>` tags; the content is all other text.

    The JSON decides where a call ends, and a tag within its strings is text. Where one call is
    malformed, or repeats a key, or has one that is not known, there are no calls: the content is
    the whole text, and `failure` says why. A tag that no call follows stays in the content, with
    `failure` too."""
    reasoning, rest = _split_thought(text)
    calls: list[dict[str, Any]] = []
    pieces, start = [], 0
    try:
        for begin, end, call in _calls(rest):
            pieces.append(rest[start:begin])
            calls.append(call)
            start = end
    except Malformed as error:
        return Parsed(reasoning, rest, failure=str(error))
    pieces.append(rest[start:])
    content = "\n".join(filter(None, map(str.strip, pieces))) if calls else rest
    failure = f"a {OPEN} without a call stays text" if OPEN in content else ""
    return Parsed(reasoning, content, calls, failure)


def _split_thought(text: str) -> tuple[str | None, str]:
    """Return the thought before the first `</think>` that is no part of a call's JSON, and what
    follows; None and the text where there is none."""
    at, inside = -1, 0
    while (at := text.find(END_THINK, at + 1)) >= 0:
        while 0 <= (begin := text.find(OPEN, inside)) < at:
            inside = _end_of_json(text, begin + len(OPEN)) or begin + len(OPEN)
        if inside <= at:
            thought = text[:at].strip().removeprefix("<think>").strip()
            return thought, text[at + len(END_THINK) :].lstrip()
    return None, text


def _calls(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (first character, end, call) of each. Raises Malformed."""
    at = 0
    while (begin := text.find(OPEN, at)) >= 0:
        at = begin + len(OPEN)
        first = _skip_space(text, at)
        if not text.startswith("{", first):
            continue  # prose about the tag
        try:
            body, end = _DECODER.raw_decode(text, first)
            call = _call(body)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the {OPEN} at character {begin} is malformed: {error}") from None
        at = _skip_space(text, end)
        if at < len(text):
            if not text.startswith(CLOSE, at):
                raise Malformed(f"text follows the JSON of the {OPEN} at character {begin}")
            at += len(CLOSE)
        yield begin, at, call


def _call(body: dict[str, Any]) -> dict[str, Any]:
    """Return a call in OpenAI's form. Raises ValueError."""
    if isinstance(body.get("function"), dict) and not body.keys() - {"function", "id", "type"}:
        body = body["function"]  # OpenAI's own form
    if unknown := sorted(body.keys() - {*OTHER_KEYS, *ARGUMENTS}):
        raise ValueError(f"it has {unknown[0]!r} beside name and arguments")
    name = body.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its name is {name!r}")
    given = [body[key] for key in ARGUMENTS if body.get(key) not in (None, "")]
    if len(given) > 1 and given[0] != given[1]:
        raise ValueError(f"it has both {' and '.join(ARGUMENTS)}")
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"its arguments are no object but {arguments!r:.80}")
    return tool_call(_encodable(name), _encodable(json.dumps(arguments, ensure_ascii=False)))


def _end_of_json(text: str, at: int) -> int | None:
    """Return where a JSON object that begins at `at`, after blanks, ends; None if none does."""
    first = _skip_space(text, at)
    try:
        return _DECODER.raw_decode(text, first)[1] if text.startswith("{", first) else None
    except (ValueError, RecursionError):
        return None


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _finite(number: str) -> float:
    """Return a JSON number. Raises ValueError for one that no JSON can hold again."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite, strict=True
)


def _encodable(text: str) -> str:
    """Return the text with "?" for half surrogate pairs, which a model can escape in JSON."""
    return text.encode("utf-8", "replace").decode()
