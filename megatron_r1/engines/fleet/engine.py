"""One engine of a fleet: a server, its client, its load, and how its death is noticed.

`ServiceStats` measures its recent service: its speed, and the number of unusable replies.
`AcceptanceMeter` measures the share of drafted tokens that engines accept, by vLLM's own
counters."""

import asyncio
import contextlib
import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.responses import (
    ConnectionBroken,
    EngineDied,
    EngineError,
    EngineTimeout,
)
from megatron_r1.engines.server.server import Server

RATE_SECONDS = 60.0
"""Seconds over which `tokens_per_second` is averaged."""
RECENT_REPLIES = 100
MANY_FAULTS = 3
"""Unusable replies among the last RECENT_REPLIES that count as a defect: one may be a dropped
connection, two an accident."""
SLOW_FRACTION = 0.25
"""The share of the other engines' median rate below which an engine is slow. Equal engines differ
by less than a factor of two, also while one has long responses left and another short ones."""
ENOUGH_GROUPS = 8
"""Groups of each engine before they are compared."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class ServedGroup:
    """A group that came back at time `at`, `seconds` after its request.

    Attributes:
        at: time.monotonic() of the reply.
        seconds: from the request to the reply.
        tokens: the tokens of all its responses.
        longest: the tokens of its longest response.
    """

    at: float
    seconds: float
    tokens: int
    longest: int


class ServiceStats:
    """The service of one engine in the last `window` seconds. Times are time.monotonic()."""

    def __init__(self, began: float, window: float) -> None:
        self.began, self.window = began, window
        self._groups: deque[ServedGroup] = deque()
        self._faults: deque[bool] = deque(maxlen=RECENT_REPLIES)

    def add(self, group: ServedGroup) -> None:
        """Count a served group, and forget those that are too old."""
        self._faults.append(False)
        self._groups.append(group)
        self._forget(group.at)

    def add_fault(self) -> bool:
        """Count an unusable reply; return whether too many of the last ones were unusable."""
        self._faults.append(True)
        return sum(self._faults) >= MANY_FAULTS

    def tokens_per_second(self, timestamp: float, within: float = RATE_SECONDS) -> float:
        """Return the rate of groups that came back, whenever their tokens were sampled."""
        seconds = min(within, timestamp - self.began)
        tokens = sum(group.tokens for group in self._groups if group.at > timestamp - within)
        return tokens / seconds if seconds > 0 else 0.0

    def sequence_speed(self) -> float:
        """Return the tokens per second of one sequence: the median over groups of the longest."""
        speeds = [group.longest / group.seconds for group in self._groups if group.seconds > 0]
        return median(speeds) if speeds else 0.0

    def is_known(self, timestamp: float) -> bool:
        """Return whether the engine has served for a whole window, and enough groups in it to be
        compared with others."""
        self._forget(timestamp)
        return timestamp - self.began >= self.window and len(self._groups) >= ENOUGH_GROUPS

    def _forget(self, timestamp: float) -> None:
        while self._groups and self._groups[0].at <= timestamp - self.window:
            self._groups.popleft()


def find_slow(stats_by_engine: Mapping[Key, ServiceStats], timestamp: float) -> dict[Key, str]:
    """Return engines far slower than the others over a whole window, and by how much, in words.

    An engine with few tokens in all may simply have had little to do, and one whose sequences are
    slow may have had more of them than the others: only both together make it slow. The only engine
    is never slow, nor is one without enough groups to compare."""
    comparable = {key: stats for key, stats in stats_by_engine.items() if stats.is_known(timestamp)}
    slow = {}
    for key, stats in comparable.items():
        other_engines = [engine_stats for name, engine_stats in comparable.items() if name != key]
        if not other_engines:
            continue
        speed = stats.sequence_speed()
        usual_speed = median(engine_stats.sequence_speed() for engine_stats in other_engines)
        rate = stats.tokens_per_second(timestamp, stats.window)
        usual_rate = median(
            engine_stats.tokens_per_second(timestamp, engine_stats.window)
            for engine_stats in other_engines
        )
        if speed < SLOW_FRACTION * usual_speed and rate < SLOW_FRACTION * usual_rate:
            slow[key] = (
                f"made {speed:.3g} tokens a second and sequence, the others {usual_speed:.3g}, for "
                f"{stats.window:g} seconds"
            )
    return slow


T = TypeVar("T")
MakeServer = Callable[..., Server]
"""Makes a server from (model folder, log path, **engine settings): `EngineServer`, or
`placement.server_maker(pool)` for engines on other hosts."""

DEATH_WAIT_SECONDS = 10.0
"""How long a failed request waits to see whether its engine has died: a server whose engine core
died fails its requests first and ends a moment later."""
POLL_SECONDS = 0.1
RETRY_SECONDS = 0.5
STATS_SECONDS = 300.0
"""Window of `find_slow`: longer than a push, a cold cache or another program on its host take."""


@dataclass(eq=False)
class Engine:
    """One engine of a fleet, with its load and state.

    Attributes:
        index: the second part; no other engine has the same name at the same time.
        server: the process, on this host or another.
        client: what sends requests to its address.
        num_running: sequences in flight.
        num_occupied: sequences that the dispatcher expects to be decoded.
        tokens_expected: tokens that it expects of them.
        is_up: it answers and holds the current weights, so it gets every push.
        is_open: it gets new groups; a draining engine gets none.
        is_asleep: it is up, and waits for weights in the next push while others serve.
        role: the first part of its name, by what the fleet is for.
        died: set when its death has been noticed.
        stats: the groups and faults of the last `STATS_SECONDS`.
    """

    index: int
    server: Server
    client: EngineClient
    num_running: int = 0
    num_occupied: float = 0.0
    tokens_expected: float = 0.0
    is_up: bool = True
    is_open: bool = True
    is_asleep: bool = False
    role: str = "engine"
    died: asyncio.Event = field(default_factory=asyncio.Event)
    stats: ServiceStats = field(
        default_factory=lambda: ServiceStats(time.monotonic(), STATS_SECONDS)
    )

    @property
    def name(self) -> str:
        """The name in logs and messages, such as engine-0."""
        return f"{self.role}-{self.index}"

    async def prepare(self, policy_version: int, timeout_seconds: float) -> None:
        """Wait until the engine answers, then name its weights `policy_version`.

        Raises:
            EngineError: the server does not start in time, or refuses the version.
        """
        try:
            await self.server.wait_ready(timeout_seconds)
        except EngineError as error:
            raise EngineError(f"{self.name}: {error}") from error
        self.client.url = self.server.url  # that of a server on another host is known only now
        self.stats = ServiceStats(time.monotonic(), self.stats.window)
        await self.client.set_policy_version(policy_version)

    async def stop(self) -> None:
        """Stop the engine's processes and fail its calls; harmless if it has ended."""
        self.died.set()
        await self.client.close()
        await asyncio.to_thread(self.server.stop)

    async def await_call(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of `call`.

        Raises:
            EngineDied: the engine has died; raised at once.
            Exception: what the call raises.
        """
        if self.died.is_set():
            call.close()
            raise self.death_error()
        request = asyncio.ensure_future(call)
        death = asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait({request, death}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                error = request.exception()
                is_late = isinstance(error, EngineTimeout)
                if not isinstance(error, EngineError) or is_late or (error.status or 500) < 500:
                    return request.result()
                # A fault, or the first sign of a death, which costs the request no attempt.
                await asyncio.wait({death}, timeout=DEATH_WAIT_SECONDS)
            if not death.done():
                return request.result()
            raise self.death_error()
        finally:
            request.cancel()
            death.cancel()
            # By `asyncio.wait`: if the request itself were awaited, its CancelledError could not
            # be told from a cancellation of the caller.
            if not request.done():
                await asyncio.wait({request})
            if not request.cancelled():
                request.exception()  # mark as retrieved

    async def await_unrepeatable_call(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call that must not be repeated, as `await_call`. An engine whose
        connection breaks during a push may hold the old weights or the new ones, or be paused, so
        it counts as dead.

        Raises:
            EngineDied: the engine died, or its connection broke.
        """
        try:
            return await self.await_call(call)
        except ConnectionBroken as broken:
            raise EngineDied(f"{self.name} was lost: {broken}") from broken

    def death_error(self) -> EngineDied:
        """Return the error for calls to this engine, which has ended."""
        return EngineDied(f"{self.name} died: {self.server.describe_end()}")

    async def drain(self, within_seconds: float) -> None:
        """Wait until no sequence is in flight, the engine has died, or the time is over."""
        deadline = time.monotonic() + within_seconds
        while self.num_running and not self.died.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)

    async def is_responsive(self, within_seconds: float) -> bool:
        """Return whether the engine core answers in time, not only the HTTP server in front of it.
        An error status is an answer; a connection that cannot be made is not."""
        try:
            async with asyncio.timeout(within_seconds):
                while not self.died.is_set():
                    try:
                        await self.client.is_sleeping()
                        return True
                    except EngineError as error:
                        if error.status is not None:
                            return True
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            return False
        return True  # it has died, which was noticed already: False is for an engine that hangs


@contextlib.asynccontextmanager
async def raise_dead_after(engine: Engine, seconds: float) -> AsyncIterator[None]:
    """Raise EngineDied if the block takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineDied(f"{engine.name} has not answered for {seconds:g} seconds") from None


COUNTERS_SECONDS = 5.0
"""The time limit of reading an engine's counters; a later reply counts at the next reading."""
DRAFT_COUNTER = re.compile(
    r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)


class AcceptanceMeter:
    """Counts drafts between two readings, of all engines."""

    def __init__(self) -> None:
        self._before: dict[Engine, Counter[str]] = {}

    async def read(self, engines: Sequence[Engine]) -> dict[str, float]:
        """Return what happened since the last reading; nothing if nothing was drafted.

        speculative/acceptance: accepted over drafted tokens. speculative/length: mean tokens that a
        sequence with a draft gained in a pass, the one that follows without a draft included."""
        up = [engine for engine in engines if engine.is_up and engine.client.url]
        counts = await asyncio.gather(*map(_draft_counts, up))
        before, self._before = self._before, {}
        increments: Counter[str] = Counter()
        for engine, draft_counts in zip(up, counts, strict=True):
            counts_before = before.get(engine, Counter())
            self._before[engine] = counts_before if draft_counts is None else draft_counts
            increments += self._before[engine] - counts_before
        if not increments["draft_tokens"]:
            return {}
        return {
            "speculative/acceptance": increments["accepted_tokens"] / increments["draft_tokens"],
            "speculative/length": 1 + increments["accepted_tokens"] / increments["drafts"],
        }


async def _draft_counts(engine: Engine) -> Counter[str] | None:
    """Return an engine's counters since its start, None where it does not answer."""
    with contextlib.suppress(EngineError, TimeoutError):
        async with asyncio.timeout(COUNTERS_SECONDS):
            body = await engine.client.request("GET", "/metrics")
        draft_counts: Counter[str] = Counter()
        for name, value in DRAFT_COUNTER.findall(body.decode()):  # a line for each copy (data)
            draft_counts[name] += int(float(value))
        return draft_counts
    return None
