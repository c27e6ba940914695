"""The demonstrations of examples/agents are what the chat template and the environment say."""

import json
import random

from examples.agents import make_lookup
from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.hermes_parser import parse_hermes
from megatron_r1.agents.token_tree import TokenTree

TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}


def test_demonstrations_are_tokenized_as_episodes_are():
    tokenizer = make_lookup.lookup_tokenizer()
    continuation = Continuation(tokenizer)
    assert set(continuation.probe([TOOL]).values()) == {"exact"}
    draw, num_correct, num_episodes = random.Random(0), 0, 600
    for _ in range(num_episodes):
        rows = make_lookup.demonstrate(draw)
        question = rows[0]["prompt"].removeprefix("<|user|>").removesuffix("<|assistant|>")
        messages = [{"role": "user", "content": question}]
        for number, row in enumerate(rows):
            expected = tokenizer.encode(row["prompt"], add_special_tokens=False)
            prompt = continuation.next_prompt(TokenTree(), messages, [TOOL])
            assert prompt.token_ids == expected
            assert len(expected) < 100
            message = parse_hermes(row["response"]).message()
            messages.append(message)
            if calls := message.get("tool_calls"):
                assert set(json.loads(calls[0]["function"]["arguments"])) == {"key"}
                result = rows[number + 1]["prompt"].split("<|result|>")[-1]
                content = result.removesuffix("<|assistant|>")
                messages.append({"role": "tool", "tool_call_id": "c", "content": content})
        num_correct += len(rows) == 3
        if len(rows) == 3:  # the second entry is the answer
            assert rows[2]["response"] == messages[-2]["content"]
    assert 0.06 < num_correct / num_episodes < 0.14
