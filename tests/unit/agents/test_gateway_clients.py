"""The `openai` and `anthropic` clients, unmodified, against the gateway."""

import asyncio
import json

import anthropic
import openai
import pytest
from fakes.gateway import check_tree, gateway

CALL = (
    "<think>\nhm\n</think>\n\nLet me see.<tool_call>\n"
    '{"arguments": {"expression":  "12 * 34"}, "name": "calculate"}\n</tool_call>'
)
ANSWER = "The answer is 408. "
SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
FUNCTION = {"name": "calculate", "description": "Compute.", "parameters": SCHEMA}
QUESTION = "What is 12 * 34?"


def chat_client(served, session):
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=session.secret, max_retries=0)


def claude_client(served, session):
    return anthropic.AsyncAnthropic(base_url=served.url, api_key=session.secret, max_retries=0)


async def complete_chat(client, messages, stream, **options):
    tools = [{"type": "function", "function": FUNCTION}]
    asked = {"model": "m", "messages": messages, "tools": tools} | options
    if not stream:
        return await client.chat.completions.create(**asked)
    usage = {"include_usage": True}
    async with client.chat.completions.stream(**asked, stream_options=usage) as events:
        async for _ in events:
            pass
        return await events.get_final_completion()


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions(stream):
    async def run():
        async with gateway(CALL, ANSWER, "Bye.") as (served, session, fleet):
            client = chat_client(served, session)
            messages = [{"role": "user", "content": QUESTION}]
            first = await complete_chat(client, messages, stream)
            choice = first.choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me see."
            assert choice.message.reasoning_content == "hm"
            [call] = choice.message.tool_calls
            assert json.loads(call.function.arguments) == {"expression": "12 * 34"}
            prompt, response = fleet.calls[0]
            assert first.usage.prompt_tokens == len(prompt)
            assert first.usage.completion_tokens == len(response.token_ids)
            said = {"role": "assistant", "content": "Let me see.", "tool_calls": [call.to_dict()]}
            said["tool_calls"][0].pop("parsed_arguments", None)
            messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "408"}]
            second = await complete_chat(client, messages, stream)
            assert (second.choices[0].message.content, second.choices[0].finish_reason) == (
                ANSWER,
                "stop",
            )
            messages += [
                {"role": "assistant", "content": ANSWER.strip()},
                {"role": "user", "content": [{"type": "text", "text": "Thanks."}]},
            ]
            assert (await complete_chat(client, messages, stream)).choices[0].message.content
            check_tree(session, fleet.calls)
            assert len(session.tree.branches()) == 1, "ChatML continues with the sampled tokens"
            assert fleet.tokenizer.decode(fleet.calls[1][0]).count("12 * 34") == 2

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_responses(stream):
    async def complete(client, **asked):
        asked |= {"model": "m", "tools": [{"type": "function", "strict": False, **FUNCTION}]}
        if not stream:
            return await client.responses.create(**asked)
        async with client.responses.stream(**asked) as events:
            async for _ in events:
                pass
            return await events.get_final_response()

    async def run():
        async with gateway(CALL, ANSWER, "Bye.") as (served, session, fleet):
            client = chat_client(served, session)
            items = [{"role": "user", "content": QUESTION}]
            first = await complete(client, input=items, instructions="Be brief.")
            assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
            call = first.output[-1]
            assert json.loads(call.arguments) == {"expression": "12 * 34"}
            done = {"type": "function_call_output", "call_id": call.call_id, "output": "408"}
            replayed = [item.to_dict() for item in first.output]
            replayed[-1].pop("parsed_arguments", None)
            for part in replayed[1]["content"]:
                part.pop("parsed", None)
            second = await complete(
                client, input=[*items, *replayed, done], instructions="Be brief."
            )
            assert second.output_text == ANSWER
            assert (second.status, second.usage.output_tokens) == (
                "completed",
                len(fleet.calls[1][1].token_ids),
            )
            third = await complete(
                client,
                input="Thanks.",
                previous_response_id=second.id,
                instructions="Be brief.",
            )
            assert third.output_text == "Bye."
            check_tree(session, fleet.calls)
            assert len(session.tree.branches()) == 1

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_messages(stream):
    async def complete(client, messages):
        tool = {"name": "calculate", "description": "Compute.", "input_schema": SCHEMA}
        asked = {"model": "m", "max_tokens": 500, "system": "Be brief.", "tools": [tool]}
        if not stream:
            return await client.messages.create(messages=messages, **asked)
        async with client.messages.stream(messages=messages, **asked) as events:
            async for _ in events:
                pass
            return await events.get_final_message()

    async def run():
        async with gateway(CALL, ANSWER) as (served, session, fleet):
            client = claude_client(served, session)
            messages = [{"role": "user", "content": QUESTION}]
            first = await complete(client, messages)
            assert first.stop_reason == "tool_use"
            assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
            call = first.content[-1]
            assert call.input == {"expression": "12 * 34"}
            assert first.usage.output_tokens == len(fleet.calls[0][1].token_ids)
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "408"}
            messages += [
                {"role": "assistant", "content": [block.to_dict() for block in first.content]},
                {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
            ]
            second = await complete(client, messages)
            assert (second.stop_reason, second.content[0].text) == ("end_turn", ANSWER)
            count = await client.messages.count_tokens(
                model="m", messages=[{"role": "user", "content": QUESTION}], system="Be brief."
            )
            assert 0 < count.input_tokens < len(fleet.calls[0][0]), "without the tool"
            check_tree(session, fleet.calls)
            assert len(session.tree.branches()) == 1

    asyncio.run(run())


def test_errors_are_the_clients_own_exceptions():
    async def run():
        async with gateway() as (served, session, _):
            chat, claude = chat_client(served, session), claude_client(served, session)
            user = [{"role": "user", "content": "x"}]
            with pytest.raises(openai.BadRequestError) as refused:
                await chat.chat.completions.create(model="m", messages=user, n=2)
            assert refused.value.param == "n"
            with pytest.raises(anthropic.BadRequestError, match="container"):
                await claude.messages.create(
                    model="m", messages=user, max_tokens=5, container="box"
                )
            chat.api_key, claude.api_key = "r1-wrong", "r1-wrong"
            with pytest.raises(openai.AuthenticationError):
                await chat.chat.completions.create(model="m", messages=user)
            with pytest.raises(anthropic.AuthenticationError):
                await claude.messages.create(model="m", messages=user, max_tokens=5)
            with pytest.raises(openai.AuthenticationError):
                await chat.models.list()

    asyncio.run(run())
