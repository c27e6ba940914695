"""The health endpoint of a run: GET /health (JSON, 503 when stalled) and GET /metrics
(Prometheus)."""

import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import prometheus_client
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from r1_grading.pool import LEVELS

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.in_flight import Phase
from megatron_r1.controller.supervision.watchdog import Watchdog
from megatron_r1.controller.supervision.watched_run import WatchedRun

ADDRESS_FILE = "health_address"
METRIC_PREFIX = "megatron_r1_"
COUNTED_METRICS = ("trainer/restarts", "engines/restarts")
"""Keys of a metrics line that have counters of their own in /metrics."""
PHASE_LABELS: dict[Phase, str] = {
    "sampling": "sampling",
    "grading": "grading",
    "awaiting_teacher": "scoring",
}
"""Phases of groups by their names in both replies, on which dashboards depend."""


def run_health(watchdog: Watchdog) -> dict[str, Any]:
    """Return the state of the run as JSON.

    Its `status` is one of these:

    - ok.
    - degraded: the run goes on with fewer engines or ranks.
    - stalled: no progress for `run.hang_seconds`."""
    run = watchdog.run
    trainer, collector = run.trainer, run.collector
    phase, detail = run.recorder.view.current_phase
    pending_call = trainer.pending_call
    facts: dict[str, Any] = {
        "status": "ok",
        "step": run.recorder.latest_metrics.get("step", run.recorder.state.step),
        "steps": run.config.run.steps,
        "phase": phase,
        "detail": detail,
        "seconds_since_progress": round(watchdog.quiet_seconds, 1),
        "hang_reports": watchdog.num_reports,
        "trainer": {
            "ranks": trainer.world_size,
            "ready": len(trainer.ranks),
            "restarts": trainer.num_restarts,
            "operation": pending_call.operation if pending_call else None,
            "seconds": round(time.monotonic() - pending_call.since, 1) if pending_call else None,
            "without_reply": sorted(pending_call.missing) if pending_call else [],
        },
    }
    engines_down = 0
    if collector is not None:
        fleet, in_flight = collector.fleet, collector.in_flight
        engines_down = sum(not engine.is_up for engine in fleet.engines)
        facts["engines"] = {
            "up": len(fleet.engines) - engines_down,
            "down": engines_down,
            "restarts": fleet.num_restarts,
            "policy_version": fleet.policy_version,
            "sequences": {engine.name: engine.num_running for engine in fleet.engines},
        }
        facts["groups"] = {label: in_flight.count(phase) for phase, label in PHASE_LABELS.items()}
        facts["rewards"] = collector.pool.snapshot()
    if watchdog.is_stalled:
        facts["status"] = "stalled"
    elif engines_down or len(trainer.ranks) < trainer.world_size:
        facts["status"] = "degraded"
    return facts


class HealthServer(Collector):
    """Serves while an `async with` block runs, at `address`."""

    def __init__(self, watchdog: Watchdog, host: str, port: int) -> None:
        """Prepare to serve; the port is taken when the block begins.

        Args:
            watchdog: what is served.
            host: the address to listen on.
            port: the port; 0: any free one."""
        self._watchdog, self._host, self._port = watchdog, host, port
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        self._file = watchdog.run.folder / ADDRESS_FILE
        self.address = ""

    async def __aenter__(self) -> Self:
        """Start to serve.

        Raises:
            UserError: the port is taken.
        """
        application = web.Application()
        application.router.add_get("/health", self._health_response)
        application.router.add_get("/metrics", self._metrics_response)
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

    async def _health_response(self, _: web.Request) -> web.Response:
        facts = run_health(self._watchdog)
        return web.json_response(facts, status=503 if facts["status"] == "stalled" else 200)

    async def _metrics_response(self, _: web.Request) -> web.Response:
        content_type = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        body = prometheus_client.generate_latest(self._registry)
        return web.Response(body=body, headers=content_type)

    def collect(self) -> Iterator[Metric]:
        """Yield gauges for the newest metrics line (megatron_r1_reward_mean for "reward/mean",
        megatron_r1_phase_seconds{phase=…} for times), and counters since this process began."""
        run = self._watchdog.run
        yield from _step_metrics(run)
        is_stalled = self._watchdog.is_stalled
        yield _make_gauge("stalled", "1: nothing has moved for run.hang_seconds", is_stalled)
        yield _make_gauge(
            "seconds_since_progress",
            "seconds since any role made progress",
            self._watchdog.quiet_seconds,
        )
        yield _make_counter("hang_reports", "hangs that were reported", self._watchdog.num_reports)
        trainer = run.trainer
        yield _make_gauge("trainer_ranks", "ranks that have built their model", len(trainer.ranks))
        yield _make_counter(
            "trainer_restarts", "restarts of all ranks together", trainer.num_restarts
        )
        yield _make_counter(
            "trainer_replies", "replies of single ranks to calls", trainer.num_replies
        )
        if run.collector is not None:
            yield from _rollout_metrics(run.collector)


def _step_metrics(run: WatchedRun) -> Iterator[Metric]:
    latest_metrics = dict(run.recorder.latest_metrics)
    yield _make_gauge(
        "step", "last finished step", latest_metrics.pop("step", run.recorder.state.step)
    )
    seconds = {}
    for name, value in latest_metrics.items():
        if isinstance(value, int | float) and math.isfinite(value) and name not in COUNTED_METRICS:
            if name.startswith("time/"):
                seconds[name.removeprefix("time/")] = value
            else:
                yield _make_gauge(re.sub(r"\W", "_", name), f"{name} of the last step", value)
    yield _make_labelled_gauge(
        "phase_seconds", "seconds of each phase of the last step", "phase", seconds
    )


def _rollout_metrics(collector: RolloutCollector) -> Iterator[Metric]:
    fleet, in_flight = collector.fleet, collector.in_flight
    num_running = {engine.name: engine.num_running for engine in fleet.engines}
    are_up = {engine.name: engine.is_up for engine in fleet.engines}
    yield _make_labelled_gauge("engine_up", "1: the engine serves requests", "engine", are_up)
    yield _make_labelled_gauge(
        "engine_sequences", "sequences that the engine is generating", "engine", num_running
    )
    yield _make_counter(
        "engine_restarts", "restarts of engines that died or hung", fleet.num_restarts
    )
    yield _make_gauge(
        "engines_policy_version", "version of the weights that engines have", fleet.policy_version
    )
    yield _make_counter("samples", "responses received", in_flight.num_responses)
    yield _make_counter("tokens", "tokens of these responses", in_flight.num_tokens)
    yield _make_counter("groups", "groups sampled", in_flight.num_sampled)
    groups_in_flight: dict[str, float] = {
        label: in_flight.count(phase) for phase, label in PHASE_LABELS.items()
    }
    yield _make_labelled_gauge(
        "groups_open", "groups that are not finished", "doing", groups_in_flight
    )
    grades = CounterMetricFamily(
        f"{METRIC_PREFIX}grader_results", "results of reward workers", labels=["result"]
    )
    levels = GaugeMetricFamily(
        f"{METRIC_PREFIX}grader_jobs", "grading jobs that are not done", labels=["state"]
    )
    for name, count in collector.pool.snapshot().items():
        (levels if name in LEVELS else grades).add_metric([name], count)
    yield from (grades, levels)


def _make_gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(METRIC_PREFIX + name, meaning, value=float(value))


def _make_labelled_gauge(
    name: str, meaning: str, label: str, values: Mapping[str, float]
) -> Metric:
    family = GaugeMetricFamily(METRIC_PREFIX + name, meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _make_counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(METRIC_PREFIX + name, meaning, value=float(value))
