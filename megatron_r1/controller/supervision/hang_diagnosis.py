"""Finds the cause of a hang: inspects every role of a run (trainer ranks, engines, reward workers,
the controller), ranks them, and writes a report.

A trainer rank has a thread for this, which responds while its main thread is stuck. Not py-spy: it
reads another process's memory, which Docker forbids by default, and on its own host only."""

import asyncio
import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from r1_grading.pool import OutstandingJob

from megatron_r1.base.processes import process_table
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.in_flight import InFlightGroup, InFlightGroups, Phase
from megatron_r1.controller.supervision.watched_run import WatchedRun
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.reporting.formatting import format_seconds
from megatron_r1.trainer.rank_messages import RankStatus

ANSWER_SECONDS = 5.0
"""Time in which a rank or an engine has to answer; that it does not is a part of the report."""
STACKS_SECONDS = 1.0
"""Time that the processes of an engine have to write their stacks to its log."""
STACK_LINES = 150
"""The most lines of stacks that a report has of one engine."""
STACK_SIGNAL = signal.SIGUSR2
"""The signal on which a process of an engine writes its stacks to its log (`engines.plugin`)."""
TOKEN_COUNTER = "vllm:generation_tokens_total"
PROCESS_STATES = {
    "tracing-stop": "stopped by a debugger",
    "disk-sleep": "in the kernel, on a disk or a device",
}


@dataclass(frozen=True)
class RoleDiagnosis:
    """The result of inspecting one role of a run that hangs.

    Attributes:
        role: "trainer", "engines", "teacher", "rewards" or "controller".
        headline: the role's state in one sentence.
        details: lines of evidence.
        recover: kills what hangs, so that its supervisor starts it again; None where that is not
            possible."""

    role: str
    headline: str
    details: list[str] = field(default_factory=list)
    recover: Callable[[], Awaitable[None]] | None = None


def _indent_lines(lines: list[str], width: int = 4) -> list[str]:
    """Return the lines of all texts, each `width` spaces to the right."""
    return [" " * width + line for text in lines for line in text.splitlines()]


async def inspect_trainer(trainer: TrainerClient) -> RoleDiagnosis:
    """Inspect all ranks. The headline has the pending call, the ranks without a reply, and where
    they are."""
    pending_call = trainer.pending_call
    statuses = await trainer.socket.statuses(range(trainer.world_size), ANSWER_SECONDS)
    if pending_call is None:
        headline = "trainer: every rank waits for the controller"
    else:
        duration = format_seconds(time.monotonic() - pending_call.since)
        missing_ranks = _describe_ranks(sorted(pending_call.missing))
        locations = _describe_locations(trainer, pending_call.missing, statuses)
        headline = (
            f"trainer: {pending_call.operation!r} since {duration}, no reply from {missing_ranks}; "
            f"{locations}"
        )
    details = []
    for rank in range(trainer.world_size):
        details += _rank_lines(trainer, rank, statuses.get(rank))

    async def kill() -> None:
        await asyncio.to_thread(trainer.kill)

    can_recover = pending_call is not None and trainer.can_restart
    return RoleDiagnosis("trainer", headline, details, kill if can_recover else None)


def _describe_locations(
    trainer: TrainerClient, missing: set[int], statuses: dict[int, RankStatus]
) -> str:
    """Return where ranks are, grouped by location. Ranks that do not respond come first: the others
    wait for them."""
    by_location: dict[str, list[int]] = {}
    for rank in sorted(missing, key=lambda rank: (rank in statuses, rank)):
        location = _describe_silence(trainer, rank)
        if rank in statuses:
            main = statuses[rank].threads[0]
            collective = main.collective
            location = (
                f"in {collective}" if collective else f"in no collective, at {main.frames[-1]}"
            )
        by_location.setdefault(location, []).append(rank)
    return "; ".join(
        f"{_describe_ranks(ranks)} {location}" for location, ranks in by_location.items()
    )


def _rank_lines(trainer: TrainerClient, rank: int, status: RankStatus | None) -> list[str]:
    name = f"rank {rank}{grid_coordinates(trainer, rank)}"
    if status is None:
        return [f"{name} {_describe_silence(trainer, rank)}"]
    lines = [f"{name}: {status.operation}, for {format_seconds(status.seconds)}"]
    for index, thread in enumerate(status.threads):
        # Helper threads only if they wait for other ranks too, such as a checkpoint's.
        if index == 0 or thread.collective:
            suffix = f", in {thread.collective}" if thread.collective else ""
            lines += _indent_lines([f"thread {thread.name}{suffix}"], 2)
            lines += _indent_lines(thread.frames)
    return lines


def grid_coordinates(trainer: TrainerClient, rank: int) -> str:
    """Return where a rank is on the grid, "" before it has said it."""
    if rank >= len(trainer.ranks):
        return ""
    description = dict(trainer.ranks[rank])
    axes = ("tensor", "context", "pipeline", "expert", "data")
    return " (" + ", ".join(f"{axis} {description[f'{axis}_rank']}" for axis in axes) + ")"


def _describe_silence(trainer: TrainerClient, rank: int) -> str:
    process = trainer.processes.process_id(rank)
    silence = f"does not answer within {ANSWER_SECONDS:g} s"
    return f"{silence}: {_process_state(process)}" if process else silence


def _process_state(process: int) -> str:
    """Return whether a process of this host runs, is stopped, or has ended."""
    state = process_table.process_state(process)
    if state is None:
        return f"process {process} has ended"
    return f"process {process} is {PROCESS_STATES.get(state, state)}"


def _describe_ranks(ranks: list[int], limit: int = 16) -> str:
    numbers = ", ".join(map(str, ranks[:limit]))
    remainder = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}{remainder}"


async def _inspect_engines(collector: RolloutCollector, pushing: bool = False) -> RoleDiagnosis:
    """Inspect the engines that sample. The headline has the number of groups in flight, the age of
    the oldest, and the stuck engines.

    Args:
        collector: knows the groups in flight.
        pushing: whether a weight push is in progress."""
    fleet, in_flight = collector.fleet, collector.in_flight
    headline = _describe_in_flight(in_flight, "sampling")
    if pushing:
        headline = f"given weights after version {fleet.policy_version}"
    return await _diagnose_engines(
        list(fleet.engines), "engines", headline, in_flight.oldest("sampling")
    )


async def _inspect_teacher(collector: RolloutCollector) -> RoleDiagnosis:
    """Inspect the engines of all teachers as `_inspect_engines` does."""
    assert collector.teachers is not None, "called for runs with a teacher only"
    in_flight = collector.in_flight
    headline = _describe_in_flight(in_flight, "awaiting_teacher")
    engines = [engine for fleet in collector.teachers.fleets.values() for engine in fleet.engines]
    return await _diagnose_engines(
        engines, "teacher", headline, in_flight.oldest("awaiting_teacher")
    )


def _inspect_rewards(collector: RolloutCollector) -> RoleDiagnosis:
    """Inspect the reward workers. The headline has the groups being graded and the job that has
    taken longest."""
    oldest_group = collector.in_flight.oldest("grading")
    jobs = collector.pool.jobs()
    details = [f"oldest group: {_describe_group(oldest_group)}"] if oldest_group else []
    details += [f"counters: {collector.pool.snapshot()}"]
    details += [_describe_job(job) for job in jobs]
    headline = f"rewards: {collector.in_flight.count('grading')} groups are being graded"
    if jobs:
        headline += f"; {_describe_job(jobs[0])}"
    elif oldest_group:
        headline += (
            f"; no worker has one of them, so a served model has: {_describe_group(oldest_group)}"
        )
    return RoleDiagnosis("rewards", headline, details)


async def count_tokens(collector: RolloutCollector) -> int:
    """Return the number of tokens that all engines have generated, by vLLM's metrics; engines
    without metrics count 0."""

    async def generated_tokens(engine: Engine) -> int:
        counters = await engine.client.read_counters((TOKEN_COUNTER,), ANSWER_SECONDS)
        return counters[TOKEN_COUNTER] if counters else 0

    running_engines = [
        engine for engine in collector.fleet.engines if engine.is_up and engine.client.url
    ]
    return sum(await asyncio.gather(*(generated_tokens(engine) for engine in running_engines)))


async def _request_stacks(engine: Engine) -> str:
    """Return the stacks of an engine's processes on this host, which a signal makes them log."""
    server = engine.server
    if not isinstance(server, EngineServer) or server.process is None:
        return "runs on another host, which has its stacks"
    start = server.log_path.stat().st_size if server.log_path.exists() else 0
    members = process_table.session_members(server.process.pid)
    pids = [pid for pid in members if process_table.catches_signal(pid, STACK_SIGNAL)]
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


def _describe_in_flight(in_flight: InFlightGroups, phase: Phase) -> str:
    oldest_group = in_flight.oldest(phase)
    oldest_age = (
        f", the oldest for {format_seconds(time.monotonic() - oldest_group.since)}"
        if oldest_group
        else ""
    )
    return f"{in_flight.count(phase)} groups are not back{oldest_age}"


async def _diagnose_engines(
    engines: Sequence[Engine], role: str, headline: str, oldest: InFlightGroup | None
) -> RoleDiagnosis:
    """Inspect all engines. Those that do not respond are stuck; if all do, those with requests."""
    states = dict(zip(engines, await asyncio.gather(*map(_describe_state, engines)), strict=True))
    stuck_engines = [e for e, (_, responds) in states.items() if e.is_up and not responds]
    stuck_engines = stuck_engines or [
        engine for engine in engines if engine.is_up and engine.num_running
    ]
    details = [f"oldest group: {_describe_group(oldest)}"] if oldest else []
    for engine, (state, _) in states.items():
        details.append(f"{engine.name}: {state}")
        if engine in stuck_engines:
            details += _indent_lines((await _request_stacks(engine)).splitlines())
    headlines = [f"{role}: {headline}", *(f"{e.name}: {states[e][0]}" for e in stuck_engines)]

    async def kill() -> None:
        await asyncio.gather(*(asyncio.to_thread(engine.server.stop) for engine in stuck_engines))

    return RoleDiagnosis(role, "; ".join(headlines), details, kill if stuck_engines else None)


async def _describe_state(engine: Engine) -> tuple[str, bool]:
    """Return an engine's state, and whether its core responds."""
    if not engine.is_up:
        return "being replaced", False
    responds = not await engine.is_hanging(ANSWER_SECONDS)
    core = "answers" if responds else f"does not answer within {ANSWER_SECONDS:g} s"
    return f"{engine.num_running} sequences asked for, its core {core}", responds


def _describe_group(group: InFlightGroup) -> str:
    duration = format_seconds(time.monotonic() - group.since)
    prompt = group.prompt
    return (
        f"{prompt.kind} question {prompt.id} ({_shorten_question(prompt.question)!r}), "
        f"{group.phase.replace('_', ' ')} for {duration}"
    )


def _describe_job(pending: OutstandingJob) -> str:
    worker = f"worker {pending.worker_pid}" if pending.worker_pid else "queued"
    question = _shorten_question(pending.job.fields.get("question") or "")
    duration = format_seconds(time.monotonic() - pending.since)
    return f"{worker}: {pending.job.target}, question {question!r}, since {duration}"


def _shorten_question(question: str) -> str:
    return question.replace("\n", " ")[:80]


async def diagnose_hang(run: WatchedRun) -> list[RoleDiagnosis]:
    """Return a diagnosis per role; the first is what everything waits for."""
    collector = run.collector
    inspections = [inspect_trainer(run.trainer)]
    if collector is not None:
        inspections.append(_inspect_engines(collector, pushing=_is_pushing(run)))
        if collector.teachers is not None:
            inspections.append(_inspect_teacher(collector))
    diagnoses = {diagnosis.role: diagnosis for diagnosis in await asyncio.gather(*inspections)}
    if collector is not None:
        diagnoses["rewards"] = _inspect_rewards(collector)
    diagnoses["controller"] = _inspect_controller(run)
    awaited_role = _awaited_role(run)
    return [diagnoses.pop(awaited_role), *diagnoses.values()]


def hang_report(run: WatchedRun, diagnoses: list[RoleDiagnosis], quiet_seconds: float) -> str:
    """Return the text of a hang's report.

    Args:
        run: the roles of the run.
        diagnoses: what each role waits for.
        quiet_seconds: the time since the last progress."""
    step = run.recorder.latest_metrics.get("step", run.recorder.state.step)
    lines = [
        f"Nothing has moved for {format_seconds(quiet_seconds)}.",
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, controller on {socket.gethostname()}, "
        f"last finished step {step}",
        "",
        f"Everything waits for: {diagnoses[0].headline}",
    ]
    for diagnosis in diagnoses:
        title = diagnosis.headline
        lines += ["", title, "-" * min(len(title), 100), *_indent_lines(diagnosis.details, 0)]
    return "\n".join(lines) + "\n"


def _awaited_role(run: WatchedRun) -> str:
    """Return the role that the controller waits for.

    A pending call to the trainer comes first: engines may generate for a later step meanwhile.
    Groups are sampled, then graded, then wait for a teacher: the earliest of these comes next."""
    if run.trainer.pending_call is not None:
        return "trainer"
    collector = run.collector
    if collector is None:
        return "controller"
    if collector.in_flight.count("sampling") or _is_pushing(run):
        return "engines"
    if collector.in_flight.count("grading"):
        return "rewards"
    return "teacher" if collector.in_flight.count("awaiting_teacher") else "controller"


def _is_pushing(run: WatchedRun) -> bool:
    return run.recorder.view.current_phase[0] == "push"


def _inspect_controller(run: WatchedRun) -> RoleDiagnosis:
    phase, detail = run.recorder.view.current_phase
    activity = f"{phase} ({detail})" if detail else phase or "nothing"
    details = []
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            details += [f"task {task.get_name()}", *_indent_lines(_suspended_frames(task))]
    return RoleDiagnosis("controller", f"controller: in phase {activity}", details)


def _suspended_frames(task: asyncio.Task[Any]) -> list[str]:
    """Return the frames of a suspended task, coroutine by coroutine: `task.get_stack` has the
    outermost one only."""
    frames = []
    coroutine: Any = cast(Coroutine[Any, Any, Any], task.get_coro())
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = coroutine.cr_await
    summary = traceback.StackSummary.extract(iter(frames))
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in summary]
