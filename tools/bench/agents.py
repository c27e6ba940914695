"""Measures sessions of a tool-using agent through the gateway, with an engine that takes no time.

Agents are coroutines in a process of their own and use Chat Completions: each turn sends the
whole conversation, as agents do. The engine is a function that returns tokens made beforehand,
after `--engine-seconds`. So what is measured is the gateway: HTTP, reading, matching against the
tree, the template, decoding, parsing (vLLM's parser in a worker process), adding to the tree.

With an engine that takes no time every session waits for the others' turns, and turns/s is the
gateway's limit; with one that takes seconds, the added time is the delay of an agent's turn."""

import argparse
import asyncio
import json
import multiprocessing
import time
from array import array
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import aiohttp
import psutil

from megatron_r1.agents.gateway import Gateway, SessionLimits, TurnSampling
from megatron_r1.agents.parser_pool import ParserPool
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.server.responses import Response
from tools.bench import host
from tools.bench.host import run_in_process
from tools.bench.small_models import TOKENIZER

GOAL_MS = 5.0
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Compute an expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = (
    "I take the next step of the sum and call the tool with it, so that no digit is lost.\n"
    '<tool_call>\n{"name": "calculate", "arguments": {"expression": "12 * 34 + 56"}}\n</tool_call>'
)
QUESTION = "Compute the sum of the products of all neighbors in the list, step by step. " * 4
RESULT = "464, and the list goes on with 78, 90, 12."
MAX_CONTEXT = 1_000_000


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--sessions", type=int, nargs="+", default=[1, 100, 1000])
    options.add_argument("--turns", type=int, default=8, help="of each session")
    options.add_argument("--engine-seconds", type=float, nargs="+", default=[0.0, 10.0])
    options.add_argument("--parser", default="hermes", help="vLLM's tool parser, or none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return a dictionary per size, each measured in a process of its own."""
    sizes = []
    for seconds in args.engine_seconds:
        for sessions in args.sessions:
            size = run_in_process(measure, sessions, args.turns, seconds, args.parser)
            sizes.append(size)
            print(_describe_size(size), flush=True)
    return {"cores are worth": host.cores_worth(), "goal, ms a turn": GOAL_MS, "sizes": sizes}


def measure(*arguments: Any) -> dict[str, Any]:
    return asyncio.run(_measure_sessions(*arguments))


def _describe_size(size: dict[str, Any]) -> str:
    added = ", ".join(f"{name} {value:.1f}" for name, value in size["added, ms"].items())
    return (
        f"{size['sessions']} sessions x {size['turns']} turns, engine "
        f"{size['engine seconds']:g} s: {size['turns/s']:.0f} turns/s; processor, ms a turn: "
        f"gateway {size['cpu ms/turn']:.2f}, parser {size['parser cpu ms/turn']:.2f}; added, ms: "
        f"{added}; "
        f"{size['prompt tokens']:.0f} prompt tokens"
    )


async def _measure_sessions(
    num_sessions: int, num_turns: int, engine_seconds: float, parser: str
) -> dict[str, Any]:
    """Play all sessions at once; return turns/s, processor time and every turn's added seconds."""
    tokenizer = PromptTokenizer(str(TOKENIZER), "plain")
    tokenizer.hf_tokenizer.chat_template = CHATML
    answer = array(
        "i", [*tokenizer.hf_tokenizer.encode(ANSWER, add_special_tokens=False), tokenizer.end]
    )
    response = Response(
        answer, array("f", [-0.5] * len(answer)), array("i", [1] * len(answer)), "stop"
    )
    prompts: list[int] = []

    async def generate(prompt_ids: Any, max_tokens: int) -> Response:
        prompts.append(len(prompt_ids))
        await asyncio.sleep(engine_seconds)
        return response

    name = None if parser == "none" else parser
    context = multiprocessing.get_context("spawn")
    async with ParserPool(str(TOKENIZER), name, None, num_workers=1) as parsers:
        await parsers.check()
        async with Gateway(tokenizer, parsers) as gate:
            sampling = TurnSampling(generate, MAX_CONTEXT)
            limits = SessionLimits(num_turns, MAX_CONTEXT)
            sessions = [gate.open(limits, sampling) for _ in range(num_sessions)]
            secrets = [session.secret for session in sessions]
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                arguments = gate.url, secrets, num_turns, engine_seconds
                sessions_result = asyncio.get_running_loop().run_in_executor(
                    executor, play_sessions, *arguments
                )
                cpu_start, parser_start = time.process_time(), _children_seconds()
                delays, seconds = await sessions_result
            cpu = time.process_time() - cpu_start
            parser_cpu = _children_seconds() - parser_start
            for session in sessions:
                [branch] = session.tree.branches()
                assert branch.num_sampled == num_turns * len(answer), "every turn is continued"
    total = num_sessions * num_turns
    delays.sort()
    return {
        "sessions": num_sessions,
        "turns": num_turns,
        "engine seconds": engine_seconds,
        "turns/s": total / seconds,
        "cpu ms/turn": 1e3 * cpu / total,
        "parser cpu ms/turn": 1e3 * parser_cpu / total,
        "prompt tokens": sum(prompts) / total,
        "answer tokens": len(answer),
        "added, ms": {
            name: round(1e3 * delays[min(int(fraction * len(delays)), len(delays) - 1)], 2)
            for name, fraction in (("median", 0.5), ("99%", 0.99), ("largest", 1.0))
        },
    }


def _children_seconds() -> float:
    return sum(
        sum(child.cpu_times()[:2])  # user and system
        for child in psutil.Process().children()
        if "parser_worker" in " ".join(child.cmdline())
    )


def play_sessions(*arguments: Any) -> tuple[list[float], float]:
    return asyncio.run(_play_sessions(*arguments))


async def _play_sessions(
    url: str, secrets: list[str], num_turns: int, engine_seconds: float
) -> tuple[list[float], float]:
    """Play one agent per secret; return each turn's seconds beyond the engine's, and the whole."""
    delays: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def agent(number: int, secret: str) -> None:
            # Agents of a run do not begin in the same millisecond.
            await asyncio.sleep(engine_seconds * number / len(secrets))
            messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
            for _ in range(num_turns):
                start = time.perf_counter()
                body = json.dumps({"model": "policy", "messages": messages, "tools": [TOOL]})
                headers = {"Authorization": f"Bearer {secret}"}
                async with http.post(
                    f"{url}/v1/chat/completions", data=body, headers=headers
                ) as reply:
                    message = (await reply.json())["choices"][0]["message"]
                delays.append(time.perf_counter() - start - engine_seconds)
                call_id = message["tool_calls"][0]["id"] if message.get("tool_calls") else "0"
                result = {"role": "tool", "tool_call_id": call_id, "content": RESULT}
                messages += [message, result]

        start = time.perf_counter()
        await asyncio.gather(*(agent(*numbered) for numbered in enumerate(secrets)))
        return delays, time.perf_counter() - start
