"""A pool of processes that grade, which may hang, crash or run out of memory; its metrics."""

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import msgspec

from r1_grading.base.errors import Cause, RunError, UserError
from r1_grading.base.values import find_non_finite
from r1_grading.base.workers import START_TIMEOUT_SECONDS, WorkerLost, encode_frame
from r1_grading.remote.remote_rewards import RemoteGraders
from r1_grading.rewards import SERVED_REWARDS, FiniteGrade, Grade, resolve_reward
from r1_grading.sandbox.limits import time_limit
from r1_grading.worker import EncodedJob, JobStatus, WorkerProcess, is_memory_message

AHEAD_SECONDS = 0.02
"""Seconds of work that are sent to a worker ahead of time: enough that its pipe never runs dry. At
most this much work gets stuck behind one slow job."""
MAX_AHEAD = 64
"""The most jobs that are sent to a worker ahead of time."""
COUNTERS = ("graded", "timeouts", "crashes", "out_of_memory", "errors")
"""The counters of a snapshot, which `RewardPool.snapshot` explains."""
EMPTY = msgspec.Raw(b'""')
"""An empty response, encoded."""
SMALL_LIMIT_BYTES = 512 * 2**20
"""About the address space that importing the largest reward, with sympy, takes: with a smaller
limit, a process that ends without an error is taken to have run out of memory."""
LEVELS = ("queued", "running")
"""The numbers of a snapshot that are levels; the others are counts since the start."""


def _check_json(kind: str, values: Mapping[str, object]) -> None:
    """Raise UserError naming the first of `values` that JSON cannot hold."""
    for name, value in values.items():
        try:
            msgspec.json.encode(value)
            fault = find_non_finite(value, name)
        except (TypeError, UnicodeEncodeError) as error:
            fault = str(error)
        if fault:
            raise UserError(
                f"the {name} of a {kind} job must be JSON: {fault}",
                key=name,
                cause=Cause.MALFORMED,
            )


@dataclass(eq=False)
class OutstandingJob:
    """A job that is queued or running, and the future that `RewardPool.grade` awaits.

    Attributes:
        job: the arguments, encoded for the worker.
        timeout_seconds: wall time of the grade.
        result: the grade, when the worker has replied.
        num_crashes: workers that ended while they ran the job; at the second the grade is 0.
        worker_pid: the worker that runs the job; None while the job is queued.
        since: time.monotonic() when the job was queued, or sent to the worker.
    """

    job: EncodedJob
    timeout_seconds: float
    result: asyncio.Future[Grade]
    num_crashes: int = 0
    worker_pid: int | None = None
    since: float = field(default_factory=time.monotonic)


class RewardPool:
    """A pool of `num_workers` processes that grade; they start with the first `grade`.

    It belongs to the event loop that first uses it; workers die when the thread of that loop does.

    Args:
        num_workers: the number of processes.
        timeout_seconds: wall time for one grade; programs have more (`sandbox.limits.time_limit`).
        memory_limit_bytes: address space of a worker (about 200 MB with math-verify and
            reasoning-gym imported).

    Attributes:
        busy_seconds: time spent on grading, summed over workers.
        most_outstanding: the largest number of jobs queued and running at once, since the last
            `start_meter`.

    Raises:
        UserError: a number of workers or seconds that is not positive."""

    def __init__(
        self,
        num_workers: int = 2,
        timeout_seconds: float = 10.0,
        memory_limit_bytes: int = 2 * 1024**3,
    ) -> None:
        if num_workers < 1:
            raise UserError(
                f"rewards.workers must be at least 1, got {num_workers}",
                key="rewards.workers",
                cause=Cause.OUT_OF_RANGE,
            )
        if not timeout_seconds > 0:
            raise UserError(
                f"rewards.timeout_seconds must be positive, got {timeout_seconds}",
                key="rewards.timeout_seconds",
                cause=Cause.OUT_OF_RANGE,
            )
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_limit_bytes = memory_limit_bytes
        self._ids = itertools.count()
        self._encoded = "", EMPTY
        self._queue: deque[OutstandingJob] = deque()
        self._running: dict[int, OutstandingJob] = {}
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: set[WorkerProcess] = set()
        self._counters: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._remote = RemoteGraders()
        self.busy_seconds = 0.0
        self.most_outstanding = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def grade(self, kind: str, response: str, truth: object, /, **fields: object) -> Grade:
        """Return the grade of one response.

        A failure that the response causes (time, memory, a crash) is a grade of 0 with the reason;
        a reward that raises gives `Grade.ungraded`.

        Args:
            kind: a registered reward or "module:function".
            response: the text that the policy sampled.
            truth: what the reward compares with; JSON.
            **fields: the prompt's other fields and the reward's options; JSON.

        Returns:
            The grade, with its reason.

        Raises:
            UserError: a mistake of the user: an unknown kind, a module that cannot be imported, a
                truth or field that is not JSON.
            RunError: no worker can be started, the pool is closed, or a served model is down
                (`remote.service.ServiceError`)."""
        if self._failure is not None:
            raise self._failure
        if kind in SERVED_REWARDS:
            return await self._remote.grade(kind, response, truth, fields)
        target = resolve_reward(kind)
        job_id = next(self._ids)
        job = EncodedJob(job_id, target, truth, fields, EMPTY)
        try:
            encoded_job = msgspec.json.encode(job)
        except (TypeError, UnicodeEncodeError):
            _check_json(kind, {"truth": truth, **fields})
            raise
        if b"null" in encoded_job:  # what NaN and infinity become
            _check_json(kind, {"truth": truth, **fields})
        job.response = self._as_json(response)
        limit = time_limit(kind, fields, self.timeout_seconds)
        result = asyncio.get_running_loop().create_future()
        outstanding_job = OutstandingJob(job, limit, result)
        self._queue.append(outstanding_job)
        num_outstanding = len(self._queue) + len(self._running)
        self.most_outstanding = max(self.most_outstanding, num_outstanding)
        self._work.set()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run_worker()) for _ in range(self.num_workers)]
        return await outstanding_job.result

    def _as_json(self, response: str) -> msgspec.Raw:
        """Return `response` as JSON, which `encode_frame` copies.

        It is encoded once for all terms of its reward, which are graded one after the other:
        encoding 30,000 tokens takes 0.2 ms."""
        if response is not self._encoded[0]:
            try:
                response_json = msgspec.json.encode(response)
            except UnicodeEncodeError:  # a lone surrogate, which JSON allows, has no UTF-8 form
                response_json = msgspec.json.encode(
                    response.encode("utf-8", "replace").decode("utf-8")
                )
            self._encoded = response, msgspec.Raw(response_json)
        return self._encoded[1]

    def snapshot(self) -> dict[str, int]:
        """Return counts since the start, and the numbers of jobs that are queued and running now.

        graded: calls whose reward returned a grade. timeouts, crashes, out_of_memory, errors: calls
        whose reward did not; a crash that was retried counts twice."""
        counts = {name: self._counters[name] for name in COUNTERS}
        counts |= {"queued": len(self._queue), "running": len(self._running)}
        return counts | self._remote.snapshot()

    def start_meter(self) -> "RewardMeter":
        """Return a meter of what happens from now on; `most_outstanding` starts from 0 again."""
        self.most_outstanding = 0
        return RewardMeter(self)

    def jobs(self, limit: int = 20) -> list[OutstandingJob]:
        """Return running and then queued jobs, each the oldest first, at most `limit`."""
        outstanding_jobs = [*self._running.values(), *self._queue]
        outstanding_jobs.sort(key=lambda pending: (pending.worker_pid is None, pending.since))
        return outstanding_jobs[:limit]

    async def close(self) -> None:
        """Kill the workers; a `grade` still waiting raises RunError. Safe to call again."""
        self._fail_pool(RunError("the reward pool is closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers), self._remote.close())

    async def _run_worker(self) -> None:
        """Keep one worker running until the pool closes or fails."""
        try:
            while self._failure is None:
                await self._work.wait()
                worker = await WorkerProcess.start(self.memory_limit_bytes)
                self._workers.add(worker)
                try:
                    await self._feed_worker(worker)
                finally:
                    await worker.kill()
                self._workers.discard(worker)
        except Exception as error:  # noqa: BLE001 - raised again by every `grade`
            self._fail_pool(error)

    async def _feed_worker(self, worker: WorkerProcess) -> None:
        """Send jobs to one worker until it is lost or must be replaced."""
        sent_jobs: deque[OutstandingJob] = deque()
        try:
            while True:
                self._send_jobs(worker, sent_jobs)
                if not sent_jobs:
                    if not self._queue:
                        self._work.clear()
                    await self._work.wait()
                elif not await self._finish_first(worker, sent_jobs):
                    return
        finally:
            for sent_job in sent_jobs:
                self._running.pop(sent_job.job.id, None)
                sent_job.worker_pid = None
            self._queue.extendleft(reversed(sent_jobs))
            self._work.set()

    def _send_jobs(self, worker: WorkerProcess, sent: deque[OutstandingJob]) -> None:
        num_ahead = min(MAX_AHEAD, max(1, int(AHEAD_SECONDS / worker.seconds_per_job)))
        share = math.ceil(len(self._queue) / self.num_workers)
        for _ in range(min(share, num_ahead - len(sent))):
            if sent and sent[-1].timeout_seconds > self.timeout_seconds:
                break  # a program may take a minute: no job waits behind it
            outstanding_job = self._queue.popleft()
            if outstanding_job.result.done():  # its caller was cancelled
                continue
            sent.append(outstanding_job)
            outstanding_job.worker_pid, outstanding_job.since = worker.process.pid, time.monotonic()
            self._running[outstanding_job.job.id] = outstanding_job
            worker.send(encode_frame(outstanding_job.job))

    async def _finish_first(self, worker: WorkerProcess, sent: deque[OutstandingJob]) -> bool:
        """Wait for the first of the sent jobs. Return False when the worker must be replaced."""
        first = sent[0]
        is_loaded = first.job.target in worker.loaded
        limit = first.timeout_seconds if is_loaded else START_TIMEOUT_SECONDS
        started_at = time.perf_counter()
        try:
            async with asyncio.timeout(limit):
                reply = await worker.receive()
                if reply.id != first.job.id:
                    raise WorkerLost(f"a reply to job {reply.id} instead of {first.job.id}")
        except TimeoutError:
            self._running.pop(sent.popleft().job.id, None)
            if is_loaded:
                self._counters["timeouts"] += 1
                self._set_grade(first, Grade(0.0, f"timed out after {limit:g} s"))
            else:
                self._fail_job(first, f"its module took over {limit:g} s to import")
            return False
        except WorkerLost:
            await self._handle_crash(worker, sent)
            return False
        finally:
            if is_loaded:
                self.busy_seconds += time.perf_counter() - started_at
        if reply.status == "loaded":
            worker.loaded.add(first.job.target)
            return True
        self._running.pop(sent.popleft().job.id, None)
        self._handle_reply(first, reply)
        elapsed_seconds = time.perf_counter() - started_at
        worker.seconds_per_job += 0.2 * (elapsed_seconds - worker.seconds_per_job)
        return reply.status != "memory"

    async def _handle_crash(self, worker: WorkerProcess, sent: deque[OutstandingJob]) -> None:
        status = await worker.kill()
        first = sent[0]
        first.num_crashes += 1
        self._counters["crashes"] += 1
        if first.num_crashes == 2:
            self._running.pop(sent.popleft().job.id, None)
            ending = f"signal {-status}" if status < 0 else f"exit status {status}"
            message = f": {worker.last_words}" if worker.last_words else ""
            if first.job.target in worker.loaded:
                reason = f"the grader's process died twice ({ending}){message}"
                self._set_grade(first, Grade(0.0, reason))
            else:
                # A process that has ended leaves its status and the line that it printed last. C
                # code that gets no memory often ends it by a signal, or without a word.
                is_silent = status < 0 or not worker.last_words
                is_out_of_memory = is_memory_message(worker.last_words) or (
                    is_silent and self.memory_limit_bytes < SMALL_LIMIT_BYTES
                )
                self._fail_job(
                    first, f"importing it ends the process ({ending}){message}", is_out_of_memory
                )

    def _handle_reply(self, job: OutstandingJob, reply: JobStatus) -> None:
        if reply.status == "unloadable":
            self._fail_job(job, reply.reason, reply.is_out_of_memory)
            return
        counter = {"graded": "graded", "memory": "out_of_memory"}.get(reply.status, "errors")
        limit = f" of {self.memory_limit_bytes / 2**20:.0f} MiB" if reply.status == "memory" else ""
        try:
            kind = Grade if reply.is_bounded else FiniteGrade
            grade = kind(
                reply.reward,
                reply.reason + limit,
                is_graded=reply.status != "failed",
                verdict=reply.verdict,
                missing=reply.missing,
            )
        except ValueError as error:
            counter, grade = "errors", Grade(0.0, str(error))
        self._counters[counter] += 1
        self._set_grade(job, grade)

    def _set_grade(self, job: OutstandingJob, grade: Grade) -> None:
        if not job.result.done():
            job.result.set_result(grade)

    def _fail_job(self, job: OutstandingJob, reason: str, is_out_of_memory: bool = False) -> None:
        if not job.result.done():
            if is_out_of_memory:
                reason += f" (within {self.memory_limit_bytes:,} bytes: rewards.memory_gib)"
            error = UserError(
                f"reward {job.job.target!r} cannot be used: {reason}",
                key="rewards.memory_gib" if is_out_of_memory else job.job.target,
                cause=Cause.OUT_OF_RANGE if is_out_of_memory else Cause.FAILED,
            )
            job.result.set_exception(error)

    def _fail_pool(self, error: Exception) -> None:
        self._failure = self._failure or error
        outstanding_jobs = [*self._running.values(), *self._queue]
        self._queue.clear()
        for outstanding_job in outstanding_jobs:
            if not outstanding_job.result.done():
                outstanding_job.result.set_exception(error)


class RewardMeter:
    """The `rewards/…` numbers of metrics.jsonl since `RewardPool.start_meter`; one at a time."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self._counts = pool.snapshot()
        self._busy_seconds = pool.busy_seconds
        self._started = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the metrics since the start.

        rewards/graded, /timeouts, /crashes, …: the pool's counters. rewards/most_outstanding: the
        largest number of jobs queued and running at once. rewards/busy: the share of the time that
        workers were grading, averaged over them."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        counts = {
            f"rewards/{name}": count - self._counts.get(name, 0)
            for name, count in self._pool.snapshot().items()
            if name not in LEVELS
        }
        busy_fraction = (self._pool.busy_seconds - self._busy_seconds) / (
            seconds * self._pool.num_workers
        )
        return {
            **counts,
            "rewards/most_outstanding": self._pool.most_outstanding,
            "rewards/busy": min(busy_fraction, 1.0),
        }
