"""Parses turns in the form of Hermes and Qwen, with tool calls as JSON, in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_r1.agents.parsed_turn import ParsedTurn, tool_call
from megatron_r1.agents.parser_worker import ParseJob

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
