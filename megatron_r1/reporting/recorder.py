"""A run as it is written down: folder, TensorBoard, terminal, and where it was left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.reporting.live import LiveView
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.tensorboard import TensorBoardLog


@dataclass
class RunState:
    """What the controller has to remember across a restart; saved inside every checkpoint.

    step: finished steps; optimizer_step: finished updates; sampler: position in the data.
    """

    step: int = 0
    optimizer_step: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Opens a locked run folder, finds the newest checkpoint and forgets what came after it.

    Whatever a kill left behind - a torn line, a half-written checkpoint, steps whose checkpoint
    never came - is cut off here, so that the steps that follow are in every file exactly once."""

    def __init__(
        self,
        folder: RunFolder,
        config: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        may_change: Sequence[str],
        title: str,
        total_steps: int,
        facts: Sequence[str] = (),
    ):
        folder.write_config(config, may_change, defaults)
        self.folder = folder
        for leftover in folder.checkpoints.glob(".*.partial"):
            shutil.rmtree(leftover)
        self.checkpoint = newest_checkpoint(folder.checkpoints)
        self.state = RunState()
        if self.checkpoint is not None:
            self.state = RunState(**json.loads((self.checkpoint / STATE_FILE).read_text()))
        self.resumed = self.checkpoint is not None
        folder.truncate_after(self.state.step if self.resumed else -1)
        purge = self.state.step + 1 if self.resumed else None
        self._tensorboard = TensorBoardLog(folder.tensorboard, purge_step=purge)
        self.view = LiveView(title, total_steps, facts=facts, history=folder.read_metrics())
        for line in folder.read_evaluations():
            self.view.evaluation(line)

    def step(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write a finished step down everywhere."""
        self.folder.append_samples(samples)
        self.folder.append_metrics(metrics)
        self._tensorboard.write(metrics)
        self.view.step(metrics, samples)

    def evaluation(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write down a held-out evaluation: "step" and "eval/…"."""
        self.folder.append_samples(samples)
        self.folder.append_evaluation(metrics)
        self._tensorboard.write(metrics)
        self.view.evaluation(metrics)

    async def save(self, trainer: Any, keep: int) -> None:
        """Have the trainer write this step's checkpoint, then delete all but the `keep` newest."""
        folder = self.folder.checkpoints / f"step_{self.state.step:08d}"
        await trainer.call("save_checkpoint", folder=str(folder), state=asdict(self.state))
        self.checkpoint = folder
        for old in _checkpoints(self.folder.checkpoints)[:-keep]:
            shutil.rmtree(old)

    def close(self, outcome: str = "finished") -> None:
        self._tensorboard.close()
        self.view.close(outcome)


STATE_FILE = "run_state.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in `folder`, or None."""
    return next(iter(reversed(_checkpoints(folder))), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("step_*") if (f / STATE_FILE).is_file())
