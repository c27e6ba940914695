"""A rollout through the controller, with synthetic engines that answer at once or at a given pace.

Engines and trainer ranks are processes of this bench that speak the real protocols, HTTP and
ZeroMQ; all between them is the controller's own code: client, checks, grading in worker processes,
sample log, advantages, packing, and the samples' way to the ranks. So the seconds are what the
controller adds to sampling, on the cores that the engines, the graders and the ranks share here."""

import argparse
from typing import Any

from tools.bench import host
from tools.bench.controller.rollout import measure
from tools.bench.controller.synthetic import GROUP
from tools.bench.host import in_own_process

GIB = 2**30
MAX_ADDED, MAX_BLOCK, MAX_BYTES = 20.0, 100.0, 8e9
"""Aims for a full rollout: seconds beyond sampling, milliseconds in which the event loop does
nothing else, bytes of memory."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--groups", type=int, nargs="+", default=[32, 64])
    options.add_argument("--tokens", type=int, default=30_000, help="of each response")
    options.add_argument("--ranks", type=int, default=2048)
    options.add_argument("--replicas", type=int, default=16, help="which get samples of their own")
    options.add_argument("--sampling-seconds", type=float, default=0.0, help="of a whole rollout")
    options.add_argument("--routing", action="store_true", help="with the experts of every token")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return a dictionary per size, each measured in a process of its own."""
    sizes = []
    for groups in chosen.groups:
        size = groups, chosen.tokens, chosen.ranks, chosen.replicas
        case = chosen.routing, chosen.sampling_seconds
        sizes.append(in_own_process(measure, *size, *case))
        print("\n  ".join([_line(sizes[-1]), *beyond(sizes[-1])]), flush=True)
    return {"cores are worth": host.cores_worth(), "group": GROUP, "sizes": sizes}


def beyond(size: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure of a rollout that is beyond its aim."""
    added, memory = size["seconds"]["added"], size["peak bytes"]["RssAnon"]
    blocked = [
        f"the event loop did nothing else for {ms:.0f} ms in {phase}, at most {MAX_BLOCK:.0f} "
        "wanted"
        for phase, ms in size["longest block, ms"].items()
        if ms > MAX_BLOCK
    ]
    late = [f"{added:.1f} s added beyond sampling, at most {MAX_ADDED:.0f} wanted"]
    large = [f"{memory / 1e9:.1f} GB held, at most {MAX_BYTES / 1e9:.0f} wanted"]
    return blocked + late * (added > MAX_ADDED) + large * (memory > MAX_BYTES)


def _line(size: dict[str, Any]) -> str:
    seconds, peak = size["seconds"], size["peak bytes"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "added")
    cpu = ", ".join(f"{name} {value:.1f}" for name, value in size["cpu seconds"].items())
    blocks, computed = (
        ", ".join(f"{name} {ms:.0f}" for name, ms in size[key].items())
        for key in ("longest block, ms", "longest computation, ms")
    )
    each = 1e9 * seconds["added"] / size["response tokens"]
    return (
        f"{size['groups']} x {GROUP} x {size['tokens']:,} tokens: {seconds['added']:.2f} s added "
        f"({phases}), {each:.0f} ns a token; longest block, ms: {blocks} (of its own "
        f"computing: {computed}); "
        f"{size['blocks over 100 ms']} over 100 ms; peak {peak['RssAnon'] / GIB:.2f} GiB of "
        f"{peak['VmRSS'] / GIB:.2f} with files; CPU s: {cpu}; call_all "
        f"{min(size['call_all, seconds']):.2f} to {max(size['call_all, seconds']):.2f} s"
    )
