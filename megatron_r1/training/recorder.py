"""A run as it is written down: folder, checkpoints, TensorBoard, terminal; where it was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.reporting.live import LiveView
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.tensorboard import TensorBoardLog
from megatron_r1.training.checkpoints import starting
from megatron_r1.training.checkpoints.series import CheckpointSeries
from megatron_r1.training.client import TrainerClient


@dataclass
class RunState:
    """What the controller has to remember across a restart; saved inside every checkpoint.

    step: finished steps; optimizer_step: finished updates, from which the learning rate follows;
    sampler: position in the data; rewards: what reward workers and services did since the run
    began (`RewardPool.snapshot`).
    """

    step: int = 0
    optimizer_step: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Opens a locked run folder, finds the newest checkpoint and forgets what came after it.

    Whatever a kill left behind - a torn line, a half-written checkpoint, steps whose checkpoint
    never came - is cut off here, so that the steps that follow are in every file exactly once."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        may_change: Sequence[str],
        title: str,
        facts: Sequence[str] = (),
    ):
        """Raises ValueError for settings other than the run's, or if damage left no checkpoint."""
        # First, so that a mistake is not written down as the run's settings.
        note = _note_on_start(config)
        folder.write_config(config.model_dump(), may_change, Config().model_dump())
        self.folder = folder
        self.state = RunState()
        self.latest: Mapping[str, Any] = {}
        """The metrics line of the newest step of this process."""
        notes = [note] if note else []
        self.checkpoints = CheckpointSeries(folder.checkpoints, config.checkpoint, notes.append)
        self._go_back()
        self.view = LiveView(title, config.run.steps, facts=facts, history=folder.read_metrics())
        for line in folder.read_evaluations():
            self.view.evaluation(line)
        for note in notes:
            self.view.message(note)
        self.checkpoints.say = self.view.message

    @property
    def resumed(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self.checkpoints.latest is not None

    async def load(self, trainer: TrainerClient, reference: bool) -> None:
        """Put the trainer where the run was left; goes further back where a checkpoint is damaged.

        reference: whether it holds a reference policy. Raises ValueError when none is good.
        """
        found = self.checkpoints.latest
        await self.checkpoints.verify(trainer)
        if self.checkpoints.latest != found:
            self._rewind()
        await self.checkpoints.load(trainer, reference)

    def go_back(self) -> None:
        """Be where the newest checkpoint was, because the ranks were lost with what came after."""
        self.checkpoints.start_again()
        self._rewind()

    def step(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write a finished step down everywhere."""
        self.folder.append_samples(samples)
        self.folder.append_metrics(metrics)
        self._tensorboard.write(metrics)
        self.view.step(metrics, samples)
        self.latest = dict(metrics)

    def evaluation(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write down a held-out evaluation: "step" and "eval/…"."""
        self.folder.append_samples(samples)
        self.folder.append_evaluation(metrics)
        self._tensorboard.write(metrics)
        self.view.evaluation(metrics)

    async def save(self, trainer: TrainerClient) -> None:
        """Have the trainer write this step's checkpoint; it is final a while later."""
        await self.checkpoints.save(trainer, self.state.step, asdict(self.state))

    def close(self, outcome: str = "finished") -> None:
        self._tensorboard.close()
        self.view.close(outcome)

    def _rewind(self) -> None:
        self._tensorboard.close()
        self._go_back()
        self.view.rewind(self.folder.read_metrics(), self.folder.read_evaluations())

    def _go_back(self) -> None:
        """Be where the newest checkpoint was: state, and every file cut back to its step."""
        saved = self.checkpoints.state()
        vars(self.state).update(vars(RunState(**saved or {})))
        self.folder.truncate_after(self.state.step if self.resumed else -1)
        purge = self.state.step + 1 if self.resumed else None
        self._tensorboard = TensorBoardLog(self.folder.tensorboard, purge_step=purge)


def _note_on_start(config: Config) -> str | None:
    """What a person should know of `model.checkpoint`. Raises ValueError for a wrong one."""
    if not config.model.checkpoint:
        return None
    return starting.check_folder(Path(config.model.checkpoint))
