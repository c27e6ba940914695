"""Inspects the roles of a run: trainer ranks, engines and reward workers.

A trainer rank has a thread for this, which responds while its main thread is stuck. Not py-spy: it
reads another process's memory, which Docker forbids by default, and on its own host only."""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from r1_grading.pool import OutstandingJob

from megatron_r1.base.processes import inspection
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.in_flight import InFlight, InFlightGroup, Phase
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.trainer.wire import RankStatus

ANSWER_SECONDS = 5.0
"""Time in which a rank or an engine has to answer; that it does not is a part of the report."""
STACKS_SECONDS = 1.0
"""Time that the processes of an engine have to write their stacks to its log."""
STACK_LINES = 150
"""The most lines of stacks that a report has of one engine."""
STACK_SIGNAL = signal.SIGUSR2
"""The signal on which a process of an engine writes its stacks to its log (`engines.plugin`)."""
TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)
STATES = {
    "tracing-stop": "stopped by a debugger",
    "disk-sleep": "in the kernel, on a disk or a device",
}


@dataclass(frozen=True)
class RoleFinding:
    """The result of inspecting one role of a run that hangs. headline: the role's state
    in one sentence. details: lines of evidence. recover: kills what hangs, so that its supervisor
    starts it again; None where that is not possible."""

    role: str
    headline: str
    details: list[str] = field(default_factory=list)
    recover: Callable[[], Awaitable[None]] | None = None


def indented(lines: list[str], by: int = 4) -> list[str]:
    """Return the lines of all texts, each `by` spaces to the right."""
    return [" " * by + line for text in lines for line in text.splitlines()]


def rounded(seconds: float) -> str:
    """Format a duration as "12 s", "3 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"


async def inspect_trainer(trainer: TrainerClient) -> RoleFinding:
    """Inspect all ranks. The headline has the open call, the ranks without a reply, and where they
    are."""
    waiting = trainer.waiting
    statuses = await trainer.socket.statuses(range(trainer.world_size), ANSWER_SECONDS)
    if waiting is None:
        headline = "trainer: every rank waits for the controller"
    else:
        since = rounded(time.monotonic() - waiting.since)
        missing = _ranks(sorted(waiting.missing))
        where = _locations(trainer, waiting.missing, statuses)
        headline = f"trainer: {waiting.operation!r} since {since}, no reply from {missing}; {where}"
    details = []
    for rank in range(trainer.world_size):
        details += _rank_lines(trainer, rank, statuses.get(rank))

    async def kill() -> None:
        await asyncio.to_thread(trainer.kill)

    can_recover = waiting is not None and trainer.can_restart
    return RoleFinding("trainer", headline, details, kill if can_recover else None)


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
    name = f"rank {rank}{coordinates(trainer, rank)}"
    if status is None:
        return [f"{name} {_silence(trainer, rank)}"]
    lines = [f"{name}: {status.operation}, for {rounded(status.seconds)}"]
    for index, thread in enumerate(status.threads):
        # Helper threads only if they wait for other ranks too, such as a checkpoint's.
        if index == 0 or thread.collective:
            inside = f", in {thread.collective}" if thread.collective else ""
            lines += indented([f"thread {thread.name}{inside}"], 2) + indented(thread.frames)
    return lines


def coordinates(trainer: TrainerClient, rank: int) -> str:
    """Return where a rank is on the grid, "" before it has said it."""
    if rank >= len(trainer.ranks):
        return ""
    own = dict(trainer.ranks[rank])
    axes = ("tensor", "context", "pipeline", "expert", "data")
    return " (" + ", ".join(f"{axis} {own[f'{axis}_rank']}" for axis in axes) + ")"


def _silence(trainer: TrainerClient, rank: int) -> str:
    process = trainer.processes.process_id(rank)
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


async def inspect_engines(rollouts: RolloutCollector, pushing: bool = False) -> RoleFinding:
    """Inspect the engines that sample. The headline has the open groups, since when, and the stuck
    engines. pushing: whether a weight push is in progress."""
    fleet, in_flight = rollouts.fleet, rollouts.in_flight
    headline = _open_groups(in_flight, "sampling")
    if pushing:
        headline = f"given weights after version {fleet.version}"
    return await _inspect(fleet, "engines", headline, in_flight.oldest("sampling"))


async def inspect_teacher(rollouts: RolloutCollector) -> RoleFinding:
    """Inspect the teacher's engines as `inspect_engines` does."""
    assert rollouts.teacher is not None, "called for runs with a teacher only"
    in_flight = rollouts.in_flight
    headline = _open_groups(in_flight, "scoring")
    return await _inspect(rollouts.teacher, "teacher", headline, in_flight.oldest("scoring"))


def inspect_rewards(rollouts: RolloutCollector) -> RoleFinding:
    """Inspect the reward workers. The headline has the groups being graded and the job that has
    taken longest."""
    oldest = rollouts.in_flight.oldest("grading")
    jobs = rollouts.pool.jobs()
    details = [f"oldest group: {_describe_group(oldest)}"] if oldest else []
    details += [f"counters: {rollouts.pool.snapshot()}"]
    details += [_describe_job(job) for job in jobs]
    headline = f"rewards: {rollouts.in_flight.count('grading')} groups are being graded"
    if jobs:
        headline += f"; {_describe_job(jobs[0])}"
    elif oldest:
        headline += f"; no worker has one of them, so a served model has: {_describe_group(oldest)}"
    return RoleFinding("rewards", headline, details)


async def count_tokens(rollouts: RolloutCollector) -> int:
    """Return the number of tokens that all engines have generated, by vLLM's metrics; engines
    without metrics count 0."""

    async def of(engine: Engine) -> float:
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                body = await engine.client.request("GET", "/metrics")
            return sum(float(count) for count in TOKENS.findall(body.decode()))
        return 0.0

    up = [engine for engine in rollouts.fleet.engines if engine.is_up and engine.client.url]
    return int(sum(await asyncio.gather(*(of(engine) for engine in up))))


async def stacks(engine: Engine) -> str:
    """Return the stacks of an engine's processes on this host, which a signal makes them log."""
    server = engine.server
    if not isinstance(server, EngineServer) or server.process is None:
        return "runs on another host, which has its stacks"
    start = server.log_path.stat().st_size if server.log_path.exists() else 0
    members = inspection.session_members(server.process.pid)
    pids = [pid for pid in members if inspection.catches_signal(pid, STACK_SIGNAL)]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
    if not pids:
        return "none of its processes can be asked for stacks"
    await asyncio.sleep(STACKS_SECONDS)
    with open(server.log_path, "rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()[:STACK_LINES]
    lines = lines or ["no process writes its stacks: they are stopped, or gone"]
    return "\n".join([f"stacks of processes {', '.join(map(str, pids))}:", *lines])


def _open_groups(in_flight: InFlight, phase: Phase) -> str:
    oldest = in_flight.oldest(phase)
    since = f", the oldest for {rounded(time.monotonic() - oldest.since)}" if oldest else ""
    return f"{in_flight.count(phase)} groups are not back{since}"


async def _inspect(
    fleet: RolloutFleet, role: str, headline: str, oldest: InFlightGroup | None
) -> RoleFinding:
    """Inspect all engines. Those that do not respond are stuck; if all do, those with requests."""
    engines = list(fleet.engines)
    states = dict(zip(engines, await asyncio.gather(*map(_state, engines)), strict=True))
    stuck = [e for e, (_, responds) in states.items() if e.is_up and not responds]
    stuck = stuck or [engine for engine in engines if engine.is_up and engine.num_running]
    details = [f"oldest group: {_describe_group(oldest)}"] if oldest else []
    for engine, (state, _) in states.items():
        details.append(f"{engine.name}: {state}")
        if engine in stuck:
            details += indented((await stacks(engine)).splitlines())
    headlines = [f"{role}: {headline}", *(f"{e.name}: {states[e][0]}" for e in stuck)]

    async def kill() -> None:
        await asyncio.gather(*(asyncio.to_thread(engine.server.stop) for engine in stuck))

    return RoleFinding(role, "; ".join(headlines), details, kill if stuck else None)


async def _state(engine: Engine) -> tuple[str, bool]:
    """Return an engine's state, and whether its core responds."""
    if not engine.is_up:
        return "being replaced", False
    responds = await engine.answers(ANSWER_SECONDS)
    core = "answers" if responds else f"does not answer within {ANSWER_SECONDS:g} s"
    return f"{engine.num_running} sequences asked for, its core {core}", responds


def _describe_group(group: InFlightGroup) -> str:
    since = rounded(time.monotonic() - group.since)
    return (
        f"{group.prompt.kind} question {group.prompt.id} ({_short(group.prompt.question)!r}), "
        f"{group.phase} for {since}"
    )


def _describe_job(pending: OutstandingJob) -> str:
    where = f"worker {pending.worker_pid}" if pending.worker_pid else "queued"
    question = _short(pending.job.fields.get("question") or "")
    since = rounded(time.monotonic() - pending.since)
    return f"{where}: {pending.job.target}, question {question!r}, since {since}"


def _short(question: str) -> str:
    return question.replace("\n", " ")[:80]
