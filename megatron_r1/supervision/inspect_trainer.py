"""Inspects trainer ranks, through a thread of each that responds while its main thread is stuck."""

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
    """Inspect all ranks. The headline has the open call, the ranks without a reply, and where they
    are."""
    waiting = trainer.waiting
    statuses = await trainer.socket.statuses(range(trainer.world_size), ANSWER_SECONDS)
    if waiting is None:
        headline = "trainer: every rank waits for the controller"
    else:
        since = seconds(time.monotonic() - waiting.since)
        missing = _ranks(sorted(waiting.missing))
        where = _locations(trainer, waiting.missing, statuses)
        headline = f"trainer: {waiting.operation!r} since {since}, no reply from {missing}; {where}"
    details = []
    for rank in range(trainer.world_size):
        details += _rank_lines(trainer, rank, statuses.get(rank))

    async def kill() -> None:
        await asyncio.to_thread(trainer.kill)

    can_recover = waiting is not None and trainer.can_restart
    return Finding("trainer", headline, details, kill if can_recover else None)


def _locations(trainer: TrainerClient, missing: set[int], statuses: dict[int, RankStatus]) -> str:
    """Return where ranks are, grouped by location. Ranks that do not respond come first: the others
    wait for them."""
    by_location: dict[str, list[int]] = {}
    for rank in sorted(missing, key=lambda rank: (rank in statuses, rank)):
        location = _silence(trainer, rank)
        if rank in statuses:
            main = statuses[rank].threads[0]
            inside = main.collective
            location = f"in {inside}" if inside else f"in no collective, at {main.frames[-1]}"
        by_location.setdefault(location, []).append(rank)
    return "; ".join(f"{_ranks(ranks)} {location}" for location, ranks in by_location.items())


def _rank_lines(trainer: TrainerClient, rank: int, status: RankStatus | None) -> list[str]:
    name = f"rank {rank}{_coordinates(trainer, rank)}"
    if status is None:
        return [f"{name} {_silence(trainer, rank)}"]
    lines = [f"{name}: {status.operation}, for {seconds(status.seconds)}"]
    for index, thread in enumerate(status.threads):
        # Helper threads only if they wait for other ranks too, such as a checkpoint's.
        if index == 0 or thread.collective:
            inside = f", in {thread.collective}" if thread.collective else ""
            lines += indented([f"thread {thread.name}{inside}"], 2) + indented(thread.frames)
    return lines


def _coordinates(trainer: TrainerClient, rank: int) -> str:
    if rank >= len(trainer.ranks):
        return ""
    coordinates = trainer.ranks[rank]
    axes = ("tensor", "pipeline", "expert", "data")
    return " (" + ", ".join(f"{axis} {coordinates[f'{axis}_rank']}" for axis in axes) + ")"


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
