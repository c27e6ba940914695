"""Random sessions of careless harnesses, with a journal of what the engine sampled."""

from __future__ import annotations

import json
import random
from array import array
from dataclasses import dataclass, field

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.sampling_mask import encode_mask

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]
ROW = 6
"""Bytes of an invented row of routed experts: of which call, and of which token."""
MARK = 1 << 20
"""Above every token: a kept token that names the sampled one."""


@dataclass
class Session:
    """One tree with the journal of its engine. starts: how often a conversation was begun that no
    earlier one continues."""

    tokenizer: object
    seed: int
    tree: TokenTree = field(default_factory=TokenTree)
    calls: list[tuple[list[int], Response, int]] = field(default_factory=list)
    starts: int = 0
    version: int = 0
    drawn: int = 0

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.continuation = Continuation(self.tokenizer)

    def ask(self, messages, text=None, canonical=False, cut=None):
        """Send a request; return the engine's answer as a message."""
        prompt = self.continuation.next_prompt(self.tree, messages, TOOLS)
        tools = TOOLS if prompt.parent is None else ()
        prompt_node = self.tree.add_prompt(prompt.parent, prompt.token_ids, prompt.messages, tools)
        text = self.answer() if text is None else text
        cut = self.rng.random() < 0.15 if cut is None else cut
        token_ids = self.tokens(text, canonical) + ([] if cut else [self.tokenizer.eos_token_id])
        prompt_ids = self.tree.token_ids(prompt_node).tolist()
        response = self.response(token_ids, len(prompt_ids), cut)
        message = parse(text)
        node = self.tree.add_sampled(prompt_node, response, message)
        self.calls.append((prompt_ids, response, node))
        return message

    def answer(self):
        rng, text = self.rng, ""
        if rng.random() < 0.5:
            text = f"<think>{rng.choice(['', chr(10)])}hm {rng.randrange(99)}.\n</think>\n\n"
        if rng.random() < 0.6:
            call = {"name": "calculate", "arguments": {"expression": f"{rng.randrange(99)} × 3"}}
            if rng.random() < 0.5:
                call = dict(reversed(call.items()))
            spelled = json.dumps(
                call,
                ensure_ascii=rng.random() < 0.5,
                separators=rng.choice([(", ", ": "), (",", ":"), (",  ", " : ")]),
            )
            blank = rng.choice(["\n", "", " "])
            return f"{text}<tool_call>{blank}{spelled}{blank}</tool_call>"
        return (
            text
            + rng.choice(["", " ", "\n"])
            + f"The answer is {rng.randrange(999)}."
            + rng.choice(["", "\n", "  "])
        )

    def tokens(self, text, canonical=False):
        """Return tokens of `text`: the tokenizer's, or others with the same text."""
        if canonical or len(text) < 2:
            return self.tokenizer.encode(text, add_special_tokens=False)
        at = sorted(self.rng.sample(range(1, len(text)), min(len(text) - 1, self.rng.randrange(6))))
        pieces = [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
        return [
            t for piece in pieces for t in self.tokenizer.encode(piece, add_special_tokens=False)
        ]

    def response(self, token_ids, num_prompt, cut):
        rng, versions = self.rng, []
        for _ in token_ids:
            self.version += rng.random() < 0.02
            versions.append(self.version)
        rows = b"".join(
            len(self.calls).to_bytes(3, "big") + at.to_bytes(3, "big")
            for at in range(num_prompt + len(token_ids) - 1)
        )
        self.drawn += len(token_ids)  # no two log-probabilities of a session are equal
        logprobs = array("f", (-(self.drawn - at) / 4096 for at in range(len(token_ids))))
        kept_ids = [[token, MARK + self.drawn - at] for at, token in enumerate(token_ids)]
        return Response(
            *(array("i", token_ids), logprobs, array("i", versions)),
            *("length" if cut else "stop", rows),
            sampling_mask=encode_mask(kept_ids),
        )


def parse(text):
    """Return an answer as a message: reasoning, content and tool call."""
    message = {"role": "assistant", "content": text}
    if "</think>" in text:
        thought, _, text = text.partition("</think>")
        message["reasoning_content"] = thought.removeprefix("<think>").strip()
        message["content"] = text.lstrip("\n")
    if "<tool_call>" in text:
        before, _, call = text.partition("<tool_call>")
        call = json.loads(call.removesuffix("</tool_call>"))
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        message["content"] = before.strip() or None
        message["tool_calls"] = [{"id": "c", "type": "function", "function": function}]
    return message


def careless(message, rng):
    """Return an answer as a harness may send it back."""
    message = dict(message)
    if rng.random() < 0.4:
        message.pop("reasoning_content", None)
    if rng.random() < 0.4:
        message["content"] = (message["content"] or "").strip()
    if "tool_calls" in message and rng.random() < 0.7:
        call = message["tool_calls"][0]
        arguments = json.loads(call["function"]["arguments"])
        spelled = json.dumps(arguments, separators=(",", ":"), ensure_ascii=rng.random() < 0.5)
        function = {**call["function"], "arguments": spelled}
        message["tool_calls"] = [
            {"id": f"c{rng.randrange(9)}", "type": "function", "function": function}
        ]
    return message


def play(tokenizer, seed):
    """Play a session of several conversations: main agent, sub-agents, compaction, retries."""
    session = Session(tokenizer, seed)
    rng = session.rng
    conversations = [begin(session)]
    for _ in range(rng.randrange(1, 9)):
        messages = rng.choice(conversations)
        message = session.ask(messages)
        event = rng.random()
        if event < 0.08:
            conversations.append(begin(session))
        elif event < 0.16 and len(messages) > 2:
            session.starts += 1
            summary = f"So far: {rng.randrange(10**9)}"
            messages[:] = [messages[0], {"role": "user", "content": summary}]
        elif event < 0.26:
            continue  # the harness lost the answer and sends the same request again
        else:
            messages.append(careless(message, rng))
            messages.extend(replies(message, rng))
    return session


def begin(session):
    session.starts += 1
    task = {"role": "user", "content": f"Task {session.starts}: {session.rng.randrange(10**6)}"}
    return [{"role": "system", "content": f"Be agent {session.starts}."}, task]


def replies(message, rng):
    if "tool_calls" in message:
        results = [{"role": "tool", "tool_call_id": "c", "content": f"result {rng.randrange(999)}"}]
        if rng.random() < 0.2:
            results.append({"role": "user", "content": "Hurry."})
        return results
    return [{"role": "user", "content": f"And {rng.randrange(99)}?"}]
