"""Where every trainer rank is: asked of its side thread, which answers while the rank is stuck."""

from __future__ import annotations

import asyncio
import time

from megatron_r1.processes import inspection
from megatron_r1.supervision.findings import Finding, indented, seconds
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.wire import RankStatus

ANSWER_SECONDS = 5.0
STATES = {
    "tracing-stop": "stopped by a debugger",
    "disk-sleep": "in the kernel, on a disk or a device",
}


async def inspect_trainer(trainer: TrainerClient) -> Finding:
    """Headline: the call everything waits for, the ranks that owe a reply, and what they are in."""
    waiting = trainer.waiting
    found = await trainer.socket.statuses(range(trainer.world_size), ANSWER_SECONDS)
    if waiting is None:
        headline = "trainer: every rank waits for the controller"
    else:
        since = seconds(time.monotonic() - waiting.since)
        headline = f"trainer: {waiting.operation!r} since {since}, no reply from "
        headline += f"{_ranks(sorted(waiting.missing))}; {_places(trainer, waiting.missing, found)}"
    details = []
    for rank in range(trainer.world_size):
        details += _rank_lines(trainer, rank, found.get(rank))

    async def kill() -> None:
        await asyncio.to_thread(trainer.kill)

    mends = waiting is not None and trainer.can_restart
    return Finding("trainer", headline, details, kill if mends else None)


def _places(trainer: TrainerClient, missing: set[int], found: dict[int, RankStatus]) -> str:
    """Ranks in the same place together, those that say nothing first: they are what the others
    wait for."""
    together: dict[str, list[int]] = {}
    for rank in sorted(missing, key=lambda rank: (rank in found, rank)):
        place = _silence(trainer, rank)
        if rank in found:
            main = found[rank].threads[0]
            inside = main.collective
            place = f"in {inside}" if inside else f"in no collective, at {main.frames[-1]}"
        together.setdefault(place, []).append(rank)
    return "; ".join(f"{_ranks(ranks)} {place}" for place, ranks in together.items())


def _rank_lines(trainer: TrainerClient, rank: int, found: RankStatus | None) -> list[str]:
    name = f"rank {rank}{_coordinates(trainer, rank)}"
    if found is None:
        return [f"{name} {_silence(trainer, rank)}"]
    lines = [f"{name}: {found.operation}, for {seconds(found.seconds)}"]
    for index, thread in enumerate(found.threads):
        # Of helper threads only those that wait for other ranks too, such as a checkpoint's.
        if index == 0 or thread.collective:
            inside = f", in {thread.collective}" if thread.collective else ""
            lines += indented([f"thread {thread.name}{inside}"], 2) + indented(thread.frames)
    return lines


def _coordinates(trainer: TrainerClient, rank: int) -> str:
    if rank >= len(trainer.ranks):
        return ""
    place = trainer.ranks[rank]
    axes = ("tensor", "pipeline", "expert", "data")
    return " (" + ", ".join(f"{axis} {place[f'{axis}_rank']}" for axis in axes) + ")"


def _silence(trainer: TrainerClient, rank: int) -> str:
    process = trainer.process_of(rank)
    silent = f"does not answer within {ANSWER_SECONDS:g} s"
    return f"{silent}: {process_state(process)}" if process else silent


def process_state(process: int) -> str:
    """Return whether a process of this host runs, is stopped, or has ended."""
    state = inspection.state(process)
    if state is None:
        return f"process {process} has ended"
    return f"process {process} is {STATES.get(state, state)}"


def _ranks(ranks: list[int], most: int = 16) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
