"""A prompt that is given as tokens."""

from __future__ import annotations

from array import array

from megatron_r1.agents.continuation import NextPrompt
from megatron_r1.agents.tree import TokenTree


def continue_tokens(tree: TokenTree, token_ids: list[int]) -> NextPrompt:
    """Return what to append to `tree` for a prompt that is given as tokens: the tokens after the
    longest sampled sequence with which the prompt begins, or else the whole prompt, as a new
    branch."""
    asked = array("i", token_ids)
    best: int | None = None
    length = 0
    open_nodes = [(root, 0) for root in tree.children(None)]
    while open_nodes:
        number, start = open_nodes.pop()
        node = tree.nodes[number]
        end = start + len(node.token_ids)
        if asked[start:end] != node.token_ids:
            continue
        if node.is_sampled and end >= length:
            best, length = number, end
        open_nodes += [(child, end) for child in tree.children(number)]
    return NextPrompt(best, token_ids[length:], ())
