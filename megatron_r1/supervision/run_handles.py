"""What of a run is run, and its pulse."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config import Config
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder


@dataclass
class RunHandles:
    """The roles of a run. rollouts: engines, reward workers and what they work on; None where a
    stage has none, or not yet."""

    config: Config
    recorder: Recorder
    trainer: TrainerClient
    rollouts: RolloutCollector | None = None
    num_engine_tokens: int = 0
    """That engines say they have generated; 0 where none says it."""

    @property
    def folder(self) -> Path:
        return self.recorder.folder.path

    @property
    def is_starting(self) -> bool:
        """Whether ranks or engines are being started, at first or again. While the trainer owes an
        answer, an engine that starts is not what everything waits for."""
        engines = self.rollouts.fleet.engines if self.rollouts else []
        is_down = self.trainer.waiting is None and any(not engine.is_up for engine in engines)
        return is_down or "starting" in self.recorder.view.doing[0]

    def pulse(self) -> Hashable:
        """Changes whenever any role gets on; equal to the last one where nothing moves.

        A call that is being waited for is in it by its beginning, an engine by the groups and
        tokens it has made, a worker by its grades.
        """
        trainer, view = self.trainer, self.recorder.view
        waiting = trainer.waiting
        parts: tuple[Hashable, ...] = (
            (view.doing, self.recorder.latest.get("step")),
            (trainer.num_replies, trainer.num_restarts, waiting.since if waiting else None),
        )
        if self.rollouts is not None:
            flow, fleet, pool = self.rollouts.in_flight, self.rollouts.fleet, self.rollouts.pool
            parts += (
                (flow.num_started, flow.num_groups, flow.num_graded, flow.num_scored),
                self.num_engine_tokens,
                (fleet.version, fleet.num_restarts, tuple(e.is_up for e in fleet.engines)),
                tuple(pool.snapshot().items()),
            )
        return parts
