"""Rewards graded in killable worker processes, awaited from the controller.

A grader may hang inside a C call, take all memory or end its process; none of that reaches the run.
The head of a worker's line has `timeout_seconds` of wall time, counted from the moment it runs (the
import of its module is not counted); then the worker's process group is killed and replaced.
"""

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from megatron_r1.rewards import REMOTE, resolve
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.remote.runner import RemoteRewards
from megatron_r1.rewards.runtime.process import START_TIMEOUT_SECONDS, WorkerLost, WorkerProcess
from megatron_r1.rewards.runtime.protocol import LENGTH, Job, Reply, frame
from megatron_r1.rewards.runtime.time_limits import time_limit

# Jobs handed to a worker ahead of time: enough that its pipe never runs dry, and no more work than
# this many seconds can get stuck behind one slow answer.
AHEAD_SECONDS = 0.02
MAX_AHEAD = 64
COUNTERS = ("graded", "timeouts", "crashes", "out_of_memory", "errors")

SMALL_LIMIT_BYTES = 512 * 2**20
"""About what the largest grader, with sympy, takes to be loaded."""


@dataclass(eq=False)
class _Pending:
    id: int
    target: str
    frame: bytes
    timeout_seconds: float
    result: asyncio.Future
    num_crashes: int = 0
    process: int | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class OutstandingJob:
    """A job that is not done. process: of the worker that has it, None in the queue; seconds: since
    it got there; question: of its prompt, where it says one."""

    target: str
    process: int | None
    seconds: float
    question: str | None


class RewardPool:
    """`num_workers` processes that grade; they start with the first `grade`.

    timeout_seconds: wall time for one grade; programs have more (`time_limits`).
    memory_limit_bytes: address space of a worker (about 200 MB with math-verify and reasoning-gym
    imported).
    Belongs to the event loop that first uses it; workers die when the thread of that loop does.
    busy_seconds: spent on grading, summed over workers. most_outstanding: the most jobs that were
    queued and running at once; whoever measures sets it back to 0 (`meter.RewardMeter`).
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout_seconds: float = 10.0,
        memory_limit_bytes: int = 2 * 1024**3,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"rewards.num_workers must be at least 1, got {num_workers}")
        if not timeout_seconds > 0:
            raise ValueError(f"rewards.timeout_seconds must be positive, got {timeout_seconds}")
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_limit_bytes = memory_limit_bytes
        self._ids = itertools.count()
        self._queue: deque[_Pending] = deque()
        self._running: dict[int, _Pending] = {}
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._workers: set[WorkerProcess] = set()
        self._counters: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._remote = RemoteRewards()
        self.busy_seconds = 0.0
        self.most_outstanding = 0

    async def __aenter__(self) -> "RewardPool":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def grade(self, kind: str, response: str, truth: object, /, **fields: object) -> Grade:
        """The grade of one response. `kind`: a registered reward or "package.module:function".

        What the response causes (time, memory, a crash, an exception in the grader) is a grade of 0
        with the reason. What the user causes raises ValueError: an unknown kind, a module that
        cannot be imported, a truth or field that is not JSON. RuntimeError: no worker can be
        started, the pool is closed, or a served model is down (`remote.service.ServiceError`).
        """
        if self._failure is not None:
            raise self._failure
        if kind in REMOTE:
            return await self._remote.grade(kind, response, truth, fields)
        target = resolve(kind)
        job_id = next(self._ids)
        # A lone surrogate, which JSON can smuggle in, has no UTF-8 form.
        response = response.encode("utf-8", "replace").decode("utf-8")
        try:
            encoded = frame(Job(job_id, target, response, truth, fields))
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"truth and fields of a {kind} job must be JSON: {error}") from error
        limit = time_limit(kind, fields, self.timeout_seconds)
        result = asyncio.get_running_loop().create_future()
        pending = _Pending(job_id, target, encoded, limit, result)
        self._queue.append(pending)
        outstanding = len(self._queue) + len(self._running)
        self.most_outstanding = max(self.most_outstanding, outstanding)
        self._work.set()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._tend()) for _ in range(self.num_workers)]
        return await pending.result

    def snapshot(self) -> dict[str, int]:
        """Counts since the start (graded, timeouts, crashes, out_of_memory, errors; a retried crash
        counts once more), and jobs now queued and running. `graded` counts verdicts only."""
        counts = {name: self._counters[name] for name in COUNTERS}
        counts |= {"queued": len(self._queue), "running": len(self._running)}
        return counts | self._remote.snapshot()

    def jobs(self, most: int = 20) -> list[OutstandingJob]:
        """What workers have and what is queued, those that have been there longest first."""
        outstanding = [*self._running.values(), *self._queue]
        outstanding.sort(key=lambda pending: (pending.process is None, pending.since))
        now = time.monotonic()
        return [
            OutstandingJob(p.target, p.process, now - p.since, _question(p))
            for p in outstanding[:most]
        ]

    async def close(self) -> None:
        """Kills the workers; a `grade` still waiting raises RuntimeError. Safe to call again."""
        self._fail(RuntimeError("the reward pool is closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers), self._remote.close())

    async def _tend(self) -> None:
        """Keeps one worker alive for as long as the pool is."""
        try:
            while self._failure is None:
                await self._work.wait()
                worker = await WorkerProcess.start(self.memory_limit_bytes)
                self._workers.add(worker)
                try:
                    await self._serve(worker)
                finally:
                    await worker.kill()
                self._workers.discard(worker)
        except Exception as error:
            self._fail(error)

    async def _serve(self, worker: WorkerProcess) -> None:
        """Feeds one worker until it is lost or has to go."""
        line: deque[_Pending] = deque()
        try:
            while True:
                self._feed(worker, line)
                if not line:
                    if not self._queue:
                        self._work.clear()
                    await self._work.wait()
                elif not await self._advance(worker, line):
                    return
        finally:
            for pending in line:
                self._running.pop(pending.id, None)
                pending.process = None
            self._queue.extendleft(reversed(line))
            self._work.set()

    def _feed(self, worker: WorkerProcess, line: deque[_Pending]) -> None:
        ahead = min(MAX_AHEAD, max(1, int(AHEAD_SECONDS / worker.seconds_per_job)))
        share = math.ceil(len(self._queue) / self.num_workers)
        for _ in range(min(share, ahead - len(line))):
            if line and line[-1].timeout_seconds > self.timeout_seconds:
                break  # a program may take a minute: nothing is sent to wait behind it
            pending = self._queue.popleft()
            if pending.result.done():  # whoever asked has gone
                continue
            line.append(pending)
            pending.process, pending.since = worker.process.pid, time.monotonic()
            self._running[pending.id] = pending
            worker.send(pending.frame)

    async def _advance(self, worker: WorkerProcess, line: deque[_Pending]) -> bool:
        """Waits for the head of the line; False when the worker must be replaced."""
        head = line[0]
        is_loaded = head.target in worker.loaded
        started = time.perf_counter()
        try:
            async with asyncio.timeout(
                head.timeout_seconds if is_loaded else START_TIMEOUT_SECONDS
            ):
                reply = await worker.receive()
                if reply.id != head.id:
                    raise WorkerLost(f"a reply to job {reply.id} instead of {head.id}")
        except TimeoutError:
            self._take(line)
            if is_loaded:
                self._finish(head, "timeouts", f"timed out after {head.timeout_seconds:g} s")
            else:
                self._raise(head, f"its module took over {START_TIMEOUT_SECONDS:g} s to import")
            return False
        except WorkerLost:
            await self._crashed(worker, line)
            return False
        finally:
            if is_loaded:
                self.busy_seconds += time.perf_counter() - started
        if reply.status == "loaded":
            worker.loaded.add(head.target)
            return True
        self._take(line)
        self._conclude(head, reply)
        elapsed = time.perf_counter() - started
        worker.seconds_per_job += 0.2 * (elapsed - worker.seconds_per_job)
        return reply.status != "memory"

    async def _crashed(self, worker: WorkerProcess, line: deque[_Pending]) -> None:
        status = await worker.kill()
        head = line[0]
        head.num_crashes += 1
        self._counters["crashes"] += 1
        if head.num_crashes == 2:
            self._take(line)
            ending = f"signal {-status}" if status < 0 else f"exit status {status}"
            words = f": {worker.last_words}" if worker.last_words else ""
            if head.target in worker.loaded:
                self._settle(head, Grade(0.0, f"the grader's process died twice ({ending}){words}"))
            else:
                self._raise(head, f"importing it ends the process ({ending}){words}")

    def _conclude(self, head: _Pending, reply: Reply) -> None:
        if reply.status == "graded":
            try:
                self._settle(head, Grade(reply.reward, reply.reason))
                self._counters["graded"] += 1
            except ValueError as error:
                self._finish(head, "errors", str(error))
        elif reply.status == "unloadable":
            self._raise(head, reply.reason)
        elif reply.status == "memory":
            limit = f"{self.memory_limit_bytes / 2**20:.0f} MiB"
            self._finish(head, "out_of_memory", f"{reply.reason} of {limit}")
        else:
            self._finish(head, "errors", reply.reason)

    def _take(self, line: deque[_Pending]) -> None:
        self._running.pop(line.popleft().id, None)

    def _finish(self, pending: _Pending, counter: str, reason: str) -> None:
        self._counters[counter] += 1
        self._settle(pending, Grade(0.0, reason))

    def _settle(self, pending: _Pending, grade: Grade) -> None:
        if not pending.result.done():
            pending.result.set_result(grade)

    def _raise(self, pending: _Pending, reason: str) -> None:
        if not pending.result.done():
            # Libraries that run out of memory while they load say all kinds of things.
            if "MemoryError" in reason or self.memory_limit_bytes < SMALL_LIMIT_BYTES:
                reason += f" (within {self.memory_limit_bytes:,} bytes: rewards.memory_gib)"
            error = ValueError(f"reward {pending.target!r} cannot be used: {reason}")
            pending.result.set_exception(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        outstanding = [*self._running.values(), *self._queue]
        self._queue.clear()
        for pending in outstanding:
            if not pending.result.done():
                pending.result.set_exception(error)


def _question(pending: _Pending) -> str | None:
    fields = msgspec.json.decode(pending.frame[LENGTH.size :], type=Job).fields
    return fields.get("question")
