"""A run's metrics for Prometheus, collected at each request."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_r1.rewards.runtime.meter import LEVELS
from megatron_r1.rl.in_flight import PHASES
from megatron_r1.supervision.run_handles import RunHandles
from megatron_r1.supervision.watchdog import Watchdog

PREFIX = "megatron_r1_"
COUNTED = ("trainer/restarts", "engines/restarts")
"""Keys of a metrics line that have counters of their own here."""


class RunCollector(Collector):
    """Collects gauges for every number of the newest metrics line (megatron_r1_reward_mean for
    "reward/mean", megatron_r1_phase_seconds{phase=…} for times), and counters since this process
    began."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def collect(self) -> Iterator[Metric]:
        run = self._watchdog.run
        yield from _of_the_step(run)
        yield _gauge(
            "stalled", "1: nothing has moved for run.hang_seconds", self._watchdog.is_stalled
        )
        yield _gauge("seconds_since_progress", "of any role", self._watchdog.quiet_seconds)
        yield _counter("hang_reports", "hangs noticed", self._watchdog.num_reports)
        trainer = run.trainer
        yield _gauge("trainer_ranks", "that have built their model", len(trainer.ranks))
        yield _counter("trainer_restarts", "of all ranks together", trainer.num_restarts)
        yield _counter("trainer_replies", "of single ranks to calls", trainer.num_replies)
        if run.rollouts is not None:
            yield from _of_the_rollouts(run)


def _of_the_step(run: RunHandles) -> Iterator[Metric]:
    latest = dict(run.recorder.latest)
    yield _gauge("step", "finished last", latest.pop("step", run.recorder.state.step))
    seconds = GaugeMetricFamily(f"{PREFIX}phase_seconds", "of the last step", labels=["phase"])
    for name, value in latest.items():
        if isinstance(value, int | float) and math.isfinite(value) and name not in COUNTED:
            if name.startswith("time/"):
                seconds.add_metric([name.removeprefix("time/")], value)
            else:
                yield _gauge(re.sub(r"\W", "_", name), f"{name} of the last step", value)
    yield seconds


def _of_the_rollouts(run: RunHandles) -> Iterator[Metric]:
    assert run.rollouts is not None
    fleet, in_flight, pool = run.rollouts.fleet, run.rollouts.in_flight, run.rollouts.pool
    up = GaugeMetricFamily(f"{PREFIX}engine_up", "1: it serves", labels=["engine"])
    running = GaugeMetricFamily(
        f"{PREFIX}engine_sequences", "asked for and not back", labels=["engine"]
    )
    for engine in fleet.engines:
        up.add_metric([engine.name], engine.is_up)
        running.add_metric([engine.name], engine.num_running)
    yield from (up, running)
    yield _counter("engine_restarts", "of engines that died or hung", fleet.num_restarts)
    yield _gauge("engines_policy_version", "of the weights that engines hold", fleet.version)
    yield _counter("samples", "responses that came back", in_flight.num_samples)
    yield _counter("tokens", "of these responses", in_flight.num_tokens)
    yield _counter("groups", "sampled", in_flight.num_groups)
    open_groups = GaugeMetricFamily(f"{PREFIX}groups_open", "not finished", labels=["doing"])
    for phase in PHASES:
        open_groups.add_metric([phase], in_flight.count(phase))
    yield open_groups
    grades = CounterMetricFamily(f"{PREFIX}grader_results", "of reward workers", labels=["result"])
    levels = GaugeMetricFamily(f"{PREFIX}grader_jobs", "not done", labels=["state"])
    for name, count in pool.snapshot().items():
        (levels if name in LEVELS else grades).add_metric([name], count)
    yield from (grades, levels)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, meaning, value=float(value))


def _counter(name: str, meaning: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, meaning, value=float(value))
