"""Supervises a run: the watchdog detects a run without progress, reports the cause and acts by
`run.on_hang`; lost ranks are restarted; and the run's health is served: GET /health (JSON, 503
when stalled) and GET /metrics (Prometheus)."""

import asyncio
import contextlib
import faulthandler
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Self

import prometheus_client
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from r1_grading.pool import LEVELS

from megatron_r1.base.errors import Cause, RunError, TrainerLost, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.collector import PHASES, RolloutCollector
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.supervision.diagnosis import (
    RunHandles,
    count_tokens,
    diagnose,
    report,
    rounded,
)
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.trainer.operations import FolderOperations, operation_names

MAX_TICK_SECONDS = 5.0
MIN_BLOCKED_SECONDS = 60.0
"""The least time after which a controller whose event loop is blocked has its stacks dumped. It
cannot report anything itself, so a thread of `faulthandler`, written in C, does."""


class HangError(RunError):
    """The run has made no progress for too long; the message is the diagnosis."""


class Watchdog:
    """Compares the progress of a run from tick to tick. num_reports: hangs so far."""

    def __init__(self, run: RunHandles) -> None:
        self.run = run
        self.hang_seconds = run.config.run.hang_seconds
        self.num_reports = 0
        self._progress = run.progress()
        self._quiet = 0.0

    @property
    def quiet_seconds(self) -> float:
        """Time without progress, by the last tick."""
        return self._quiet if self.run.progress() == self._progress else 0.0

    @property
    def is_stalled(self) -> bool:
        if not self.hang_seconds:
            return False
        limit = self.hang_seconds
        if self.run.is_starting:  # starting engines show no progress
            limit = max(limit, self.run.config.rollout.start_timeout_seconds)
        waiting = self.run.trainer.waiting
        if waiting is not None and waiting.operation in operation_names(FolderOperations):
            # Writing a model of a terabyte shows no progress before it is done.
            limit = max(limit, self.run.config.parallel.wait_seconds)
        return self.quiet_seconds >= limit

    async def watch(self) -> None:
        """Watch until cancelled. Raises HangError where the run must stop."""
        tick = min(MAX_TICK_SECONDS, self.hang_seconds / 5) if self.hang_seconds else 1.0
        is_reported = False
        with self._stacks_of_a_blocked_loop() as postpone, contextlib.ExitStack() as stack:
            counting = asyncio.create_task(self._count_tokens(tick))
            stack.callback(counting.cancel)
            ticked = time.monotonic()
            while True:
                await asyncio.sleep(tick)
                postpone()
                progress, now = self.run.progress(), time.monotonic()
                if progress == self._progress:
                    # At most the time of two ticks: this process may have been suspended itself.
                    self._quiet += min(now - ticked, 2 * tick)
                else:
                    if is_reported:
                        self.run.recorder.view.message("the run moves again")
                    self._progress, self._quiet, is_reported = progress, 0.0, False
                ticked = now
                if self.is_stalled and not is_reported:
                    is_reported = await self._handle_hang()
                    ticked = time.monotonic()

    async def _count_tokens(self, every_seconds: float) -> None:
        # In a task of its own: when a tick scraped an engine that was stopped, a 6 s hang was
        # noticed after 34 s.
        while True:
            await asyncio.sleep(every_seconds)
            if self.run.rollouts is not None:
                self.run.num_engine_tokens = await count_tokens(self.run.rollouts)

    async def _handle_hang(self) -> bool:
        """Write a report and act by `run.on_hang`. Return whether to stay silent until there is
        progress."""
        self.num_reports += 1
        findings = await diagnose(self.run)
        path = self.run.folder / "logs" / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        content = report(self.run, findings, self.quiet_seconds)
        await asyncio.to_thread(atomic_write, path, content)
        message = (
            f"nothing has moved for {rounded(self.quiet_seconds)}. Everything waits for "
            f"{findings[0].headline}\nall roles and stacks: {path}"
        )
        policy = self.run.config.run.on_hang
        if policy == "report":
            self.run.recorder.view.message(message)
            return True
        if policy == "stop":
            raise HangError(f"{message}\nthe same command continues from the newest checkpoint")
        if findings[0].recover is None:
            raise HangError(
                f"{message}\nthis cannot be restarted by itself; the same command continues"
            )
        self.run.recorder.view.message(f"{message}\nkilled, to be started again")
        self._quiet = 0.0
        await findings[0].recover()  # its supervisor restarts it up to its limit of restarts
        return False

    @contextlib.contextmanager
    def _stacks_of_a_blocked_loop(self) -> Iterator[Callable[[], None]]:
        """Yield a function that postpones the dump of this process's stacks; without calls of it
        they are written to `logs/controller-blocked.txt`."""
        if not self.hang_seconds:
            yield lambda: None
            return
        path = self.run.folder / "logs" / "controller-blocked.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        limit = max(self.hang_seconds, MIN_BLOCKED_SECONDS)
        with open(path, "a", encoding="utf-8") as file:

            def postpone() -> None:
                faulthandler.dump_traceback_later(limit, file=file)

            postpone()
            try:
                yield postpone
            finally:
                faulthandler.cancel_dump_traceback_later()
                with contextlib.suppress(OSError):
                    if not path.stat().st_size:
                        path.unlink()


ADDRESS_FILE = "health_address"
PREFIX = "megatron_r1_"
COUNTED = ("trainer/restarts", "engines/restarts")
"""Keys of a metrics line that have counters of their own in /metrics."""


def health(watchdog: Watchdog) -> dict[str, Any]:
    """Return the state of the run as JSON.

    status: ok; degraded: the run goes on with fewer engines or ranks; stalled: no progress for
    `run.hang_seconds`."""
    run = watchdog.run
    trainer, rollouts = run.trainer, run.rollouts
    phase, detail = run.recorder.view.doing
    waiting = trainer.waiting
    facts: dict[str, Any] = {
        "status": "ok",
        "step": run.recorder.latest.get("step", run.recorder.state.step),
        "steps": run.config.run.steps,
        "phase": phase,
        "detail": detail,
        "seconds_since_progress": round(watchdog.quiet_seconds, 1),
        "hang_reports": watchdog.num_reports,
        "trainer": {
            "ranks": trainer.world_size,
            "ready": len(trainer.ranks),
            "restarts": trainer.num_restarts,
            "operation": waiting.operation if waiting else None,
            "seconds": round(time.monotonic() - waiting.since, 1) if waiting else None,
            "without_reply": sorted(waiting.missing) if waiting else [],
        },
    }
    engines_down = 0
    if rollouts is not None:
        fleet, in_flight = rollouts.fleet, rollouts.in_flight
        engines_down = sum(not engine.is_up for engine in fleet.engines)
        facts["engines"] = {
            "up": len(fleet.engines) - engines_down,
            "down": engines_down,
            "restarts": fleet.num_restarts,
            "policy_version": fleet.version,
            "sequences": {engine.name: engine.num_running for engine in fleet.engines},
        }
        facts["groups"] = {phase: in_flight.count(phase) for phase in PHASES}
        facts["rewards"] = rollouts.pool.snapshot()
    if watchdog.is_stalled:
        facts["status"] = "stalled"
    elif engines_down or len(trainer.ranks) < trainer.world_size:
        facts["status"] = "degraded"
    return facts


class HealthServer(Collector):
    """Serves while an `async with` block runs, at `address`."""

    def __init__(self, watchdog: Watchdog, host: str, port: int) -> None:
        """port: 0 for any free one."""
        self._watchdog, self._host, self._port = watchdog, host, port
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        self._file = watchdog.run.folder / ADDRESS_FILE
        self.address = ""

    async def __aenter__(self) -> Self:
        """Start to serve. Raises UserError if the port is taken."""
        application = web.Application()
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise UserError(
                f"run.health_port: {self._port} cannot be used ({error}); choose another, or 0 for "
                "any that is free",
                key="run.health_port",
                cause=Cause.BUSY,
            ) from None
        port = self._runner.addresses[0][1]
        self.address = f"http://{self._host}:{port}"
        atomic_write(self._file, self.address + "\n")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        facts = health(self._watchdog)
        return web.json_response(facts, status=503 if facts["status"] == "stalled" else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        content_type = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        body = prometheus_client.generate_latest(self._registry)
        return web.Response(body=body, headers=content_type)

    def collect(self) -> Iterator[Metric]:
        """Yield gauges for the newest metrics line (megatron_r1_reward_mean for "reward/mean",
        megatron_r1_phase_seconds{phase=…} for times), and counters since this process began."""
        run = self._watchdog.run
        yield from _of_the_step(run)
        is_stalled = self._watchdog.is_stalled
        yield _gauge("stalled", "1: nothing has moved for run.hang_seconds", is_stalled)
        yield _gauge(
            "seconds_since_progress",
            "seconds since any role made progress",
            self._watchdog.quiet_seconds,
        )
        yield _counter("hang_reports", "hangs that were reported", self._watchdog.num_reports)
        trainer = run.trainer
        yield _gauge("trainer_ranks", "ranks that have built their model", len(trainer.ranks))
        yield _counter("trainer_restarts", "restarts of all ranks together", trainer.num_restarts)
        yield _counter("trainer_replies", "replies of single ranks to calls", trainer.num_replies)
        if run.rollouts is not None:
            yield from _of_the_rollouts(run.rollouts)


def _of_the_step(run: RunHandles) -> Iterator[Metric]:
    latest = dict(run.recorder.latest)
    yield _gauge("step", "last finished step", latest.pop("step", run.recorder.state.step))
    seconds = {}
    for name, value in latest.items():
        if isinstance(value, int | float) and math.isfinite(value) and name not in COUNTED:
            if name.startswith("time/"):
                seconds[name.removeprefix("time/")] = value
            else:
                yield _gauge(re.sub(r"\W", "_", name), f"{name} of the last step", value)
    yield _gauges("phase_seconds", "seconds of each phase of the last step", "phase", seconds)


def _of_the_rollouts(rollouts: RolloutCollector) -> Iterator[Metric]:
    fleet, in_flight = rollouts.fleet, rollouts.in_flight
    running = {engine.name: engine.num_running for engine in fleet.engines}
    up = {engine.name: engine.is_up for engine in fleet.engines}
    yield _gauges("engine_up", "1: the engine serves requests", "engine", up)
    yield _gauges("engine_sequences", "sequences that the engine is generating", "engine", running)
    yield _counter("engine_restarts", "restarts of engines that died or hung", fleet.num_restarts)
    yield _gauge(
        "engines_policy_version", "version of the weights that engines have", fleet.version
    )
    yield _counter("samples", "responses received", in_flight.num_responses)
    yield _counter("tokens", "tokens of these responses", in_flight.num_tokens)
    yield _counter("groups", "groups sampled", in_flight.num_sampled)
    open_groups: dict[str, float] = {phase: in_flight.count(phase) for phase in PHASES}
    yield _gauges("groups_open", "groups that are not finished", "doing", open_groups)
    grades = CounterMetricFamily(
        f"{PREFIX}grader_results", "results of reward workers", labels=["result"]
    )
    levels = GaugeMetricFamily(
        f"{PREFIX}grader_jobs", "grading jobs that are not done", labels=["state"]
    )
    for name, count in rollouts.pool.snapshot().items():
        (levels if name in LEVELS else grades).add_metric([name], count)
    yield from (grades, levels)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, meaning, value=float(value))


def _gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, meaning, value=float(value))


class Supervisor:
    """Watches the roles of one run, and stops or restarts what hangs or has died."""

    def __init__(
        self, config: Config, recorder: RunRecorder, trainer: TrainerClient, *, spans_hosts: bool
    ) -> None:
        """spans_hosts: the health endpoint listens on every address instead of 127.0.0.1."""
        self._run = RunHandles(config, recorder, trainer)
        self._watchdog = Watchdog(self._run)
        self._host = "0.0.0.0" if spans_hosts else "127.0.0.1"

    def watch_rollouts(self, rollouts: RolloutCollector) -> None:
        """Also supervise engines, reward workers and their groups from now on."""
        self._run.rollouts = rollouts

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch the run, and serve its health, while the block runs. Cancels the block and raises
        HangError if it hangs; a block that ends all the same counts as it ended."""
        block = asyncio.current_task()
        assert block is not None
        async with contextlib.AsyncExitStack() as stack:
            if (port := self._run.config.run.health_port) is not None:
                server = HealthServer(self._watchdog, self._host, port)
                await stack.enter_async_context(server)
                self._run.recorder.view.message(f"health: {server.address}/health, /metrics")
            failures: list[Exception] = []
            watch = asyncio.create_task(self._watch(block, failures))
            try:
                yield
            except (Exception, asyncio.CancelledError):  # also what fails as it is cancelled
                if failures and block.cancelling() == 1:  # not by a second signal as well
                    raise failures[0] from None
                raise
            finally:
                if failures:
                    block.uncancel()
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def restart_trainer(self, loss: TrainerLost) -> None:
        """Start the trainer ranks again, which go on from the newest good checkpoint. Raises `loss`
        where `run.max_trainer_restarts` are done, or where others start the ranks (torchrun
        restarts them together with the controller).

        Engines and reward workers live on meanwhile, and the sample log has what was sampled, so
        what is repeated is the training of the steps since the checkpoint."""
        trainer, recorder = self._run.trainer, self._run.recorder
        most = self._run.config.run.max_trainer_restarts
        while True:
            if not trainer.can_restart or trainer.num_restarts >= most:
                raise loss
            count = f"restart {trainer.num_restarts + 1} of at most {most}"
            recorder.view.message(f"{loss}\nstarting the trainer ranks again, {count}")
            trainer.kill()
            recorder.go_back()
            recorder.view.phase("restarting trainer", f"to go on after step {recorder.state.step}")
            try:
                return await trainer.restart()
            except TrainerLost as again:
                loss = again

    async def _watch(self, block: asyncio.Task[Any], failures: list[Exception]) -> None:
        """Watch until cancelled. Where the run must stop, cancels `block` and appends why."""
        watch = asyncio.current_task()
        assert watch is not None
        try:
            await self._watchdog.watch()
        except Exception as error:
            if not watch.cancelling():  # else the block has ended: what the end of watching raises
                failures.append(error)
                block.cancel()
            raise
