"""Agents written by others, unmodified, before a real engine: what is trained is what it sampled.

The model has random weights: its answers are noise, which the agents' own parsers must bear."""

import asyncio
import json
import os
import signal
from functools import partial

import anthropic
import openai
import pytest
from fakes.gateway import check_tree
from tiny_models import QWEN, write_model

from megatron_r1.agents.gateway import Gateway, SessionLimits, TurnSampling
from megatron_r1.agents.parser_pool import ParserPool
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from tests.harness.chat_tokenizer import chat_tokenizer

pytestmark = pytest.mark.more  # three starts of vLLM
ROOM = 16_384  # three turns of the CodeAgent take more than half of it
TOOL = {"name": "calculate", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, oracle):
    folder = tmp_path_factory.mktemp("model") / "hf"
    tokenizer = chat_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": ROOM}
    oracle(write_model, folder, QWEN | sizes, 0)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fleet(model, loop, tmp_path_factory):
    settings = {"max_model_len": ROOM, "max_num_seqs": 16, "num_threads": 1}
    fleet = EngineFleet(1, tmp_path_factory.mktemp("logs"), max_restarts=1, **settings)
    loop(fleet.start(model))
    yield fleet
    loop(fleet.close())


@pytest.fixture
def play(model, fleet, loop):
    """Calls a coroutine function with a gateway, a session and the engine's answers so far."""
    tokenizer = PromptTokenizer(str(model), "chat")
    calls = []

    async def generate(prompt_ids, max_tokens):
        [response] = await fleet.generate(
            prompt_ids, n=1, max_tokens=min(max_tokens, 40), stop_token_ids=[tokenizer.end]
        )
        calls.append((list(prompt_ids), response))
        return response

    async def main(agent):
        async with (
            ParserPool(str(model), "hermes", None, num_workers=1) as parsers,
            Gateway(tokenizer, parsers) as gateway,
        ):
            session = gateway.open(SessionLimits(50, 5000), TurnSampling(generate, ROOM))
            result = await agent(gateway, session, calls)
            return session, calls, result

    return lambda agent: loop(main(agent))


async def converse(gateway, session, calls):
    """Three turns with each of the clients."""
    chat = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session.secret)
    claude = anthropic.AsyncAnthropic(base_url=gateway.url, api_key=session.secret)
    ask, messages, items = [{"role": "user", "content": "What is 12 * 34?"}], [], []
    for _ in range(3):
        messages += ask
        tools = [{"type": "function", "function": TOOL}]
        reply = await chat.chat.completions.create(model="m", messages=messages, tools=tools)
        messages.append(reply.choices[0].message.to_dict())
    last = None
    for _ in range(3):
        last = await chat.responses.create(
            model="m", input=ask, previous_response_id=last.id if last else None
        )
    for _ in range(3):
        items += ask
        async with claude.messages.stream(model="m", messages=items, max_tokens=30) as events:
            reply = await events.get_final_message()
        content = [block.to_dict() for block in reply.content] or "(nothing)"
        items.append({"role": "assistant", "content": content})


def test_clients(play):
    session, calls, _ = play(converse)
    assert len(calls) == session.num_turns == 9
    check_tree(session, calls)
    assert {version for b in session.tree.branches() for version in b.policy_versions} == {-1, 0}


def test_an_engine_that_is_killed_costs_a_turn_not_the_episode(play, fleet):
    async def agent(gateway, session, calls):
        chat = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session.secret)
        messages = [{"role": "user", "content": "What is 12 * 34?"}]
        first = await chat.chat.completions.create(model="m", messages=messages)
        messages += [first.choices[0].message.to_dict(), {"role": "user", "content": "So?"}]
        os.killpg(fleet.engines[0].server.process.pid, signal.SIGKILL)
        await chat.chat.completions.create(model="m", messages=messages)

    session, calls, _ = play(agent)
    assert fleet.num_restarts == 1 and session.status is None
    check_tree(session, calls)


def run_agent(kind, url, key):
    """Run an agent of smolagents as its documentation shows; it fails, as the model does."""
    import smolagents

    @smolagents.tool
    def calculate(expression: str) -> str:
        """Compute an expression.

        Args:
            expression: what to compute
        """
        return str(len(expression))

    model = smolagents.OpenAIServerModel("policy", api_base=url, api_key=key)
    agent = getattr(smolagents, kind)([calculate], model, max_steps=3, verbosity_level=0)
    return agent.run("What is 12 * 34?")


@pytest.mark.parametrize(
    "kind", ["ToolCallingAgent", pytest.param("CodeAgent", marks=pytest.mark.slow)]
)
def test_smolagents(play, kind):
    pytest.importorskip("smolagents", reason="make test-packages")

    async def agent(gateway, session, calls):
        return await asyncio.to_thread(
            partial(run_agent, kind, f"{gateway.url}/v1", session.secret)
        )

    session, calls, answer = play(agent)
    assert len(calls) == session.num_turns >= 3, json.dumps(answer)
    check_tree(session, calls, is_cut=kind == "CodeAgent")
    assert session.status is None
