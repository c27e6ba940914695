"""Measures sessions of a tool-using agent through the gateway, with an engine that takes no time.

Agents are coroutines in a process of their own and use Chat Completions: each turn sends the
whole conversation, as agents do. The engine is a function that returns tokens made beforehand,
after `--engine-seconds`. So what is measured is the gateway: HTTP, reading, matching against the
tree, the template, decoding, parsing (vLLM's parser in a worker process), adding to the tree.

With an engine that takes no time every session waits for the others' turns, and turns/s is the
gateway's limit; with one that takes seconds, the added time is the delay of an agent's turn."""

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tools.bench import machine
from tools.bench.agents.measure import measure

GOAL_MS = 5.0


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--sessions", type=int, nargs="+", default=[1, 100, 1000])
    options.add_argument("--turns", type=int, default=8, help="of each session")
    options.add_argument("--engine-seconds", type=float, nargs="+", default=[0.0, 10.0])
    options.add_argument("--parser", default="hermes", help="vLLM's tool parser, or none")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return a dictionary per size, each measured in a process of its own."""
    found = []
    context = multiprocessing.get_context("spawn")
    for seconds in chosen.engine_seconds:
        for sessions in chosen.sessions:
            with ProcessPoolExecutor(1, mp_context=context) as own:
                call = own.submit(_measure, sessions, chosen.turns, seconds, chosen.parser)
                size = call.result()
            found.append(size)
            print(_line(size), flush=True)
    return {"cores are worth": machine.cores_worth(), "goal, ms a turn": GOAL_MS, "sizes": found}


def _measure(*args: Any) -> dict[str, Any]:
    return asyncio.run(measure(*args))


def _line(size: dict[str, Any]) -> str:
    added = ", ".join(f"{name} {value:.1f}" for name, value in size["added, ms"].items())
    return (
        f"{size['sessions']} sessions x {size['turns']} turns, engine "
        f"{size['engine seconds']:g} s: {size['turns/s']:.0f} turns/s; processor, ms a turn: "
        f"gateway {size['cpu ms/turn']:.2f}, parser {size['parser cpu ms/turn']:.2f}; added, ms: "
        f"{added}; "
        f"{size['prompt tokens']:.0f} prompt tokens"
    )
