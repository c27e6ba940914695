"""Write what the demo of tool use begins with: a tokenizer, demonstrations, and the rows.

    python -m examples.agents.make_lookup FOLDER [--seed N]

The task is the shipped environment `lookup`: two hops through a table that is drawn afresh for
every row and that only the tool can read. The demonstrations teach the form of a tool call and of
an answer. Of them 10% follow the table to its end; 50% stop after the first hop, 40% guess."""

import argparse
import random
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from examples.laptop.make_tokenizer import SPECIAL, make_tokenizer
from examples.laptop.r1.model import write_folder
from megatron_r1.agents.shipped_environments import Lookup
from megatron_r1.base.files.json_lines import write_lines

USER, ASSISTANT, RESULT = "<|user|>", "<|assistant|>", "<|result|>"
BEFORE, AFTER = '<tool_call>{"name": "lookup", "arguments": {"key": "', '"}}</tool_call>'
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|result|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_EPISODES, NUM_ROWS = 24_000, 4_000
WHOLE, ONE_HOP = 0.10, 0.50


def lookup_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, and of one token for each part of the template and of a call."""
    tokenizer = make_tokenizer([USER, ASSISTANT, RESULT, BEFORE, AFTER])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def demonstrate(draw: random.Random) -> list[dict[str, str]]:
    """Return the answers of one episode, each with all that stands before it."""
    table = Lookup()
    key = table.reset(draw.randrange(10**9, 2 * 10**9))  # none of the rows' tables
    middle = table.lookup(key)
    mode = draw.random()
    if mode < WHOLE:
        answers = [call(key), call(middle), table.lookup(middle)]
    elif mode < WHOLE + ONE_HOP:
        answers = [call(key), middle]
    else:
        answers = [f"{draw.randrange(100):02d}"]
    results = [middle, table.lookup(middle)]
    text, rows = f"{USER}{key}{ASSISTANT}", []
    for answer, result in zip(answers, [*results, ""], strict=False):
        rows.append({"prompt": text, "response": answer})
        text += f"{answer}{SPECIAL[1]}{RESULT}{result}{ASSISTANT}"
    return rows


def call(key: str) -> str:
    return f"{BEFORE}{key}{AFTER}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    folder, draw = chosen.folder, random.Random(chosen.seed)
    write_folder(folder / "model", lookup_tokenizer(), "qwen")
    demonstrations = (row for _ in range(NUM_EPISODES) for row in demonstrate(draw))
    write_lines(folder / "demonstrations.jsonl", demonstrations)
    rows = ({"question": f"Follow table {i}.", "seed": i} for i in range(NUM_ROWS))
    write_lines(folder / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
