"""The tokens of an episode as an append-only tree, each with its origin.

A node is a prompt (given tokens) or an engine's answer to it (sampled tokens); its token sequence
is that of all nodes from the root to it. The tokens that are trained are those that an engine
sampled, with its log-probabilities: no text is tokenized a second time. A conversation that cannot
be continued with its own tokens (`continuation`) goes on in a new branch."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.engines.episodes import Branch, Turn
from megatron_r1.engines.server.responses import Response
from megatron_r1.models import sampling_mask

Message = Mapping[str, Any]
"""A chat message in OpenAI's form."""


@dataclass(frozen=True)
class TreeNode:
    """One piece of a conversation.

    Attributes:
        parent: the number of the node before this one; None for a root.
        token_ids: int32, the tokens of this node alone.
        messages: the chat messages that the tokens stand for.
        tools: the tools that a root's prompt describes; empty for other nodes.
        logprobs: nats of each sampled token; None if the tokens were given.
        policy_versions: the version of the weights that sampled each token; None if the tokens
            were given.
        routing: the experts that processed the tokens after the previous sampled node, without the
            last token; empty unless the engine returned them.
        sampling_mask: the tokens that the sampler kept at each sampled one; empty unless the engine
            returned them."""

    parent: int | None
    token_ids: array[int]
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    logprobs: array[float] | None = None
    policy_versions: array[int] | None = None
    routing: bytes | memoryview = b""
    sampling_mask: bytes = b""

    @property
    def is_sampled(self) -> bool:
        """Whether the engine sampled these tokens; the others were given."""
        return self.logprobs is not None


class TokenTree:
    """The nodes of one episode, numbered from 0 in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: list[TreeNode] = []
        self._ends: list[int] = []
        """Tokens from the root to the end of each node."""
        self._children: dict[int | None, list[int]] = {None: []}

    def add_prompt(
        self,
        parent: int | None,
        token_ids: Iterable[int],
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
    ) -> int:
        """Add tokens that no policy sampled, and return the node's number. If an equal node follows
        `parent` already, as after a repeated request, return the number of that node.

        Args:
            parent: the number of the node that they follow; None: they begin a conversation.
            token_ids: the tokens of this node alone.
            messages: the messages that the tokens encode, in OpenAI's form.
            tools: the tools offered with them, in OpenAI's form."""
        node = TreeNode(parent, array("i", token_ids), tuple(messages), tuple(tools))
        duplicates = (number for number in self._children[parent] if self.nodes[number] == node)
        duplicate = next(duplicates, None)
        return self._add_node(node) if duplicate is None else duplicate

    def add_sampled(self, parent: int, response: Response, message: Message) -> int:
        """Add an engine's answer to the tokens of `parent`; return the node's number.

        Args:
            parent: the number of the node that the answer continues.
            response: the engine's answer.
            message: the answer as a chat message.

        Raises:
            ValueError: if a token has no log-probability or version, or if the routed experts are
                not rows of this sequence."""
        num_tokens = len(response.token_ids)
        if not len(response.logprobs) == len(response.policy_versions) == num_tokens:
            raise ValueError(f"{num_tokens} tokens without as many log-probabilities and versions")
        return self._add_node(
            TreeNode(
                parent,
                response.token_ids,
                (message,),
                logprobs=response.logprobs,
                policy_versions=response.policy_versions,
                routing=self._new_rows(parent, response),
                sampling_mask=response.sampling_mask,
            )
        )

    def path(self, node: int | None) -> list[int]:
        """Return the numbers of the nodes from the root to `node`; [] for None."""
        numbers: list[int] = []
        while node is not None:
            numbers.append(node)
            node = self.nodes[node].parent
        return numbers[::-1]

    def token_ids(self, node: int | None) -> array[int]:
        """Return all tokens from the root to the end of `node`; no tokens for None."""
        return _concatenate_arrays(
            "i", (self.nodes[number].token_ids for number in self.path(node))
        )

    def num_tokens(self, node: int) -> int:
        """Return the number of tokens from the root to the end of `node`."""
        return self._ends[node]

    def messages(self, node: int) -> list[Message]:
        """Return the messages from the root to the end of `node`."""
        return [message for number in self.path(node) for message in self.nodes[number].messages]

    def children(self, node: int | None) -> list[int]:
        """Return the nodes that follow `node`; the roots for None."""
        return self._children[node]

    def branches(self) -> list[Branch]:
        """Return a branch for every sampled node that no other sampled node follows, in the order
        of the nodes. A sampled turn that several branches share is trained in the first only."""
        sampled_nodes = [number for number, node in enumerate(self.nodes) if node.is_sampled]
        followed_nodes = {
            number for last_node in sampled_nodes for number in self.path(last_node)[:-1]
        }
        trained_nodes: set[int] = set()
        branches = []
        for last_node in sampled_nodes:
            if last_node not in followed_nodes:
                branch = self._make_branch(last_node, trained_nodes)
                if branch.num_sampled:  # an aborted turn may be empty
                    branches.append(branch)
                trained_nodes.update(self.path(last_node))
        return branches

    def _add_node(self, node: TreeNode) -> int:
        number, parent = len(self.nodes), node.parent
        self._children[parent].append(number)
        self._children[number] = []
        self.nodes.append(node)
        self._ends.append((0 if parent is None else self._ends[parent]) + len(node.token_ids))
        return number

    def _new_rows(self, parent: int, response: Response) -> bytes | memoryview:
        """Return the rows of `response.routing` for the tokens after the path's previous answer.

        The rows of earlier tokens are dropped, not stored twice: an earlier turn keeps the experts
        that really sampled it, even if the weights have changed since."""
        if not response.routing:
            return b""
        num_rows = self._ends[parent] + len(response.token_ids) - 1
        row_bytes, num_rest_bytes = divmod(len(response.routing), max(1, num_rows))
        if num_rest_bytes:
            raise ValueError(f"routing of {len(response.routing)} bytes for {num_rows} tokens")
        answer_ends = [self._ends[n] for n in self.path(parent) if self.nodes[n].is_sampled]
        return response.routing[row_bytes * (answer_ends[-1] - 1 if answer_ends else 0) :]

    def _make_branch(self, last: int, trained: set[int]) -> Branch:
        numbers = self.path(last)
        nodes = [self.nodes[number] for number in numbers]
        is_sampled, logprobs, versions = bytearray(), array("f"), array("i")
        for number, node in zip(numbers, nodes, strict=True):
            count = len(node.token_ids)
            if node.logprobs is None or node.policy_versions is None or number in trained:
                is_sampled += bytes(count)
                logprobs += array("f", bytes(4 * count))
                versions += array("i", [-1]) * count
            else:
                is_sampled += b"\1" * count
                logprobs += node.logprobs
                versions += node.policy_versions
        return Branch(
            _concatenate_arrays("i", (node.token_ids for node in nodes)),
            is_sampled=bytes(is_sampled),
            logprobs=logprobs,
            policy_versions=versions,
            routing=b"".join(bytes(node.routing) for node in nodes),
            sampling_mask=sampling_mask.concat_masks(
                (b"" if number in trained else node.sampling_mask, len(node.token_ids))
                for number, node in zip(numbers, nodes, strict=True)
            ),
        )


def tree_turns(tree: TokenTree, decode: Callable[[Sequence[int]], str]) -> list[Turn]:
    """Return the turns of an episode in the order in which they happened.

    Args:
        tree: the episode's tokens.
        decode: returns the text of tokens."""
    turns = []
    for node in tree.nodes:
        count, last_index = len(node.token_ids), len(node.messages) - 1
        if node.policy_versions is not None:
            version = node.policy_versions[-1] if node.policy_versions else None
            text = decode(node.token_ids)
            turns.append(Turn("assistant", text, count, trained=True, policy_version=version))
            continue
        turns += [
            Turn(
                message["role"],
                _message_text(message),
                count if index == last_index else 0,
                trained=False,
            )
            for index, message in enumerate(node.messages)
        ]
    return turns


def _message_text(message: Message) -> str:
    content = message.get("content") or ""
    if calls := message.get("tool_calls"):
        return f"{content}{json.dumps(calls)}"
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode("utf-8", "replace").decode()  # a tool may return half a surrogate pair


def _concatenate_arrays(typecode: str, arrays: Iterable[array[Any]]) -> array[Any]:
    concatenation: array[Any] = array(typecode)
    for part in arrays:
        concatenation += part
    return concatenation
