"""The seconds and counts of a step, for its metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megatron_r1.base.processes import timeline
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import Rollout


class StepMeter:
    """Measures the seconds and the rewards of a step, from its creation on."""

    def __init__(self, collector: RolloutCollector):
        self._teachers = collector.teachers
        self._seconds: dict[str, float] = {}
        self._meter = collector.pool.start_meter()
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds spent in phase `name`."""
        start = time.perf_counter()
        with timeline.span(f"phase/{name}"):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the reward workers, and of the teachers if there are any."""
        metrics = dict(self._meter.read())
        if self._teachers is not None:
            numbers = self._teachers.metrics().items()
            metrics |= {f"teacher/{name}": value for name, value in numbers}
        return metrics

    def times(self, rollout: Rollout) -> dict[str, float]:
        """Return the seconds of each part of the step."""
        times = {
            "time/rollout": rollout.rollout_seconds,
            "time/wait": self._seconds["rollout"],
            "time/reward": rollout.reward_seconds,
            "time/train": self._seconds["train"],
            "time/push": self._seconds["push"],
            "time/step": time.perf_counter() - self._start,
        }
        if self._teachers is not None:
            times["time/teacher"] = rollout.teacher_seconds
        return times
