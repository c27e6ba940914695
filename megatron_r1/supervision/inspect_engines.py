"""What every engine is at: its requests, whether its core answers, and its stacks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time

import aiohttp

from megatron_r1.engine.server import EngineServer
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.processes import inspection
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.rl.in_flight import InFlight, InFlightGroup, Phase
from megatron_r1.supervision.findings import Finding, indented, seconds

ANSWER_SECONDS = 5.0
STACKS_SECONDS = 1.0
STACK_LINES = 150
STACK_SIGNAL = signal.SIGUSR2
"""On which every process of an engine writes its stacks to its log (`vllm_plugin`)."""
TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)


async def inspect_engines(rollouts: RolloutCollector, pushing: bool = False) -> Finding:
    """Headline: what is asked of engines, since when, and those that owe it. pushing: they are
    being given weights."""
    fleet, flow = rollouts.fleet, rollouts.in_flight
    headline = _owed(flow, "sampling")
    if pushing:
        headline = f"given weights after version {fleet.version}"
    return await _look_at(fleet, "engines", headline, flow.oldest("sampling"))


async def inspect_teacher(rollouts: RolloutCollector) -> Finding:
    """As `inspect_engines`, of those that score."""
    assert rollouts.teacher is not None, "there is none"
    flow = rollouts.in_flight
    owed = _owed(flow, "scoring")
    return await _look_at(rollouts.teacher, "teacher", owed, flow.oldest("scoring"))


def _owed(flow: InFlight, phase: Phase) -> str:
    oldest = flow.oldest(phase)
    since = f", the oldest for {seconds(time.monotonic() - oldest.since)}" if oldest else ""
    return f"{flow.count(phase)} groups are not back{since}"


async def _look_at(
    fleet: RolloutFleet, role: str, headline: str, oldest: InFlightGroup | None
) -> Finding:
    engines = list(fleet.engines)
    states = await asyncio.gather(*(_state(engine) for engine in engines))
    details = [f"oldest group: {describe_group(oldest)}"] if oldest else []
    stuck = [e for e, (_, answers) in zip(engines, states, strict=True) if e.is_up and not answers]
    stuck = stuck or [engine for engine in engines if engine.is_up and engine.num_running]
    for engine, (words, _) in zip(engines, states, strict=True):
        details.append(f"{engine.name}: {words}")
        if engine in stuck:
            details += indented((await stacks(engine)).splitlines())
    owing = [f"{e.name}: {w}" for e, (w, _) in zip(engines, states, strict=True) if e in stuck]
    headline = "; ".join([f"{role}: {headline}", *owing])

    async def kill() -> None:
        await asyncio.gather(*(asyncio.to_thread(engine.server.stop) for engine in stuck))

    return Finding(role, headline, details, kill if stuck else None)


async def _state(engine: Engine) -> tuple[str, bool]:
    if not engine.is_up:
        return "being replaced", False
    answers = await engine.answers(ANSWER_SECONDS)
    core = "answers" if answers else f"does not answer within {ANSWER_SECONDS:g} s"
    return f"{engine.num_running} sequences asked for, its core {core}", answers


async def stacks(engine: Engine) -> str:
    """What the processes of an engine on this host write when they are asked for their stacks."""
    server = engine.server
    if not isinstance(server, EngineServer) or server.process is None:
        return "runs on another host: its stacks are for its agent there to tell"
    start = server.log_path.stat().st_size if server.log_path.exists() else 0
    members = inspection.session_members(server.process.pid)
    asked = [process for process in members if inspection.catches_signal(process, STACK_SIGNAL)]
    for process in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, STACK_SIGNAL)
    if not asked:
        return "none of its processes can be asked for stacks"
    await asyncio.sleep(STACKS_SECONDS)
    with open(server.log_path, "rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    told = lines[:STACK_LINES] or ["no process writes its stacks: they are stopped, or gone"]
    return "\n".join([f"stacks of processes {', '.join(map(str, asked))}:", *told])


def describe_group(group: InFlightGroup) -> str:
    question = group.prompt.question.replace("\n", " ")[:80]
    since = seconds(time.monotonic() - group.since)
    return (
        f"{group.prompt.kind} question {group.prompt.id} ({question!r}), {group.phase} for {since}"
    )


async def count_tokens(rollouts: RolloutCollector) -> int:
    """Tokens that all engines have made, by vLLM's own metrics; 0 where they keep none."""

    async def of(engine: Engine) -> float:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            url, headers = f"{engine.client.url}/metrics", engine.client.headers
            async with session.get(url, headers=headers) as answer:
                return sum(float(count) for count in TOKENS.findall(await answer.text()))
        return 0.0

    up = [engine for engine in rollouts.fleet.engines if engine.is_up and engine.client.url]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_SECONDS)) as session:
        return int(sum(await asyncio.gather(*(of(engine) for engine in up))))
