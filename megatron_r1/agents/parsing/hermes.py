"""Parses answers in the form of Hermes and Qwen: reasoning, content, tool calls as JSON."""

import json
import re
from collections.abc import Iterable
from typing import Any

from megatron_r1.agents.parsing.pool import Parsed
from megatron_r1.agents.parsing.worker import ParseJob, tool_call

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class HermesParser:
    """Parses answers with `parse_hermes`, in this process, without vLLM."""

    async def check(self) -> None:
        pass

    async def parse(self, job: ParseJob) -> Parsed:
        return parse_hermes(job.text)

    async def close(self) -> None:
        pass


def parse_hermes(text: str) -> Parsed:
    """Return the parts of an answer. Its tool calls are {"name": …, "arguments": {…}} between
    `<tool_call>` tags, after the content; where one of them is other text, there are no calls and
    the content is the whole text."""
    reasoning = None
    thought, is_closed, rest = text.partition("</think>")
    if is_closed:
        reasoning = thought.strip().removeprefix("<think>").strip()
        text = rest.lstrip()
    calls = _calls(match[1] for match in CALL.finditer(text))
    content = text[: text.index("<tool_call>")].strip() if calls else text
    return Parsed(reasoning, content, calls)


def _calls(bodies: Iterable[str]) -> list[dict[str, Any]]:
    """Return the calls; none if one of them is malformed."""
    calls: list[dict[str, Any]] = []
    for body in bodies:
        try:
            call = json.loads(body)
            name = call["name"]
            arguments = call.get("arguments") or {}
            text = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        calls.append(tool_call(_encodable(name), _encodable(text)))
    return calls


def _encodable(text: str) -> str:
    """Return the text with "?" for half surrogate pairs, which a model can escape in JSON."""
    return text.encode("utf-8", "replace").decode()
