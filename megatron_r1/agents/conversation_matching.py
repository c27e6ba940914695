"""Finds the turn of an episode's tree that a request continues.

The request's messages are compared with those of the tree: tool calls with equal JSON arguments are
equal, as are answers that differ in outer white space or lack their reasoning. A client of token
mode gives the whole prompt as tokens (`continue_tokens`): then they are compared with the tree's as
they are."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.agents.token_tree import Message, TokenTree


@dataclass(frozen=True)
class NextPrompt:
    """What to append to a tree before the next answer.

    Attributes:
        parent: the node that the tokens follow; None starts a new branch.
        token_ids: the tokens to append.
        messages: the messages that they stand for, in OpenAI's form."""

    parent: int | None
    token_ids: list[int]
    messages: tuple[Message, ...]


def deepest_match(
    tree: TokenTree, messages: Sequence[Message], tools: Sequence[Message]
) -> tuple[int | None, int]:
    """Return the sampled node whose conversation is the longest beginning of `messages`, the newest
    of several, and the number of its messages; (None, 0) if there is none.

    Args:
        tree: the tokens of the episode so far.
        messages: the request's conversation, in OpenAI's form.
        tools: the descriptions of its tools, in OpenAI's form."""
    best_match: tuple[int | None, int] = None, 0
    open_nodes = [
        (root, 0) for root in tree.children(None) if tree.nodes[root].tools == tuple(tools)
    ]
    while open_nodes:
        number, start = open_nodes.pop()
        node = tree.nodes[number]
        end = start + len(node.messages)
        request_messages = messages[start:end]
        if len(request_messages) < len(node.messages) or not all(
            map(_is_same, node.messages, request_messages)
        ):
            continue
        if (
            node.is_sampled
            and end < len(messages)
            and (end, number) > (best_match[1], best_match[0] or 0)
        ):
            best_match = number, end
        open_nodes += [(child, end) for child in tree.children(number)]
    return best_match


def _is_same(recorded: Message, requested: Message) -> bool:
    """Whether a request's message stands for one of the tree's."""
    if recorded == requested:
        return True
    rendered_recorded, rendered_requested = template_form(recorded), template_form(requested)
    if rendered_recorded["role"] != "assistant" or rendered_requested["role"] != "assistant":
        return rendered_recorded == rendered_requested
    thought = rendered_requested.get("reasoning_content")
    return (
        rendered_recorded["content"].strip() == rendered_requested["content"].strip()
        and _called_functions(rendered_recorded) == _called_functions(rendered_requested)
        and (
            not thought
            or thought.strip() == (rendered_recorded.get("reasoning_content") or "").strip()
        )
    )


def _called_functions(message: Message) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [(function["name"], function["arguments"]) for function in functions]


def template_form(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: content as text, a call's arguments as an object."""
    rendered_message = {key: value for key, value in message.items() if value is not None}
    content = rendered_message.get("content", "")
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    rendered_message["content"] = content
    if "reasoning" in rendered_message:
        rendered_message["reasoning_content"] = rendered_message.pop("reasoning")
    if calls := rendered_message.get("tool_calls"):
        rendered_message["tool_calls"] = [
            {
                **call,
                "function": {**call["function"], "arguments": read_arguments(call["function"])},
            }
            for call in calls
        ]
    return rendered_message


def read_arguments(function: Mapping[str, Any]) -> Any:
    """Return a call's arguments, read from JSON; {} for an empty text. Text that is no JSON, the
    model's mistake, is returned unchanged."""
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def continue_tokens(tree: TokenTree, token_ids: list[int]) -> NextPrompt:
    """Return what to append to `tree` for a prompt that is given as tokens. It is what follows the
    longest sampled sequence with which the prompt begins, or else the whole prompt, as a new
    branch."""
    prompt = array("i", token_ids)
    best_node: int | None = None
    length = 0
    open_nodes = [(root, 0) for root in tree.children(None)]
    while open_nodes:
        number, start = open_nodes.pop()
        node = tree.nodes[number]
        end = start + len(node.token_ids)
        if prompt[start:end] != node.token_ids:
            continue
        if node.is_sampled and end >= length:
            best_node, length = number, end
        open_nodes += [(child, end) for child in tree.children(number)]
    return NextPrompt(best_node, token_ids[length:], ())
