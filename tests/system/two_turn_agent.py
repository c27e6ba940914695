"""Agents as a user would write them: each asks twice, and any policy earns something sometimes."""

import sys


async def run(base_url, api_key, row):
    """Return 1 where the second answer has an odd number of characters."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": row["question"]}]
    for text in ("Sure?", None):
        reply = await client.chat.completions.create(
            model="policy", messages=messages, temperature=0.0, max_tokens=12
        )
        answer = reply.choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return float(len(answer) % 2)


def main():
    """The same as a program with Anthropic's client, graded by the row's reward."""
    import json

    from anthropic import Anthropic

    row, client, messages = json.load(sys.stdin), Anthropic(), []
    for text in (row["question"], "Sure?"):
        messages.append({"role": "user", "content": text})
        with client.messages.stream(model="m", messages=messages, max_tokens=12) as events:
            reply = events.get_final_message()
        answer = "".join(block.text for block in reply.content if block.type == "text")
        messages.append({"role": "assistant", "content": answer or "."})


if __name__ == "__main__":
    main()
