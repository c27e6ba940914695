"""Records a run in its folder, trackers and terminal, and restores it from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes import timeline
from megatron_r1.config import Config
from megatron_r1.controller.checkpoint_series import CheckpointSeries
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.reporting.live import LiveView
from megatron_r1.reporting.metric_table import shown_metrics
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.trackers.tensorboard_log import TensorBoardLog
from megatron_r1.reporting.trackers.tracker import TrackedRun
from megatron_r1.reporting.trackers.tracker_set import TrackerSet, check_trackers
from megatron_r1.trainer.checkpoints import checkpoint_folders


@dataclass
class RunState:
    """The controller's state across restarts; saved inside every checkpoint.

    Attributes:
        step: finished steps.
        optimizer_step: finished updates, which the learning rate depends on.
        sampler_state: position in the data; `sampler` in a checkpoint.
        rewards: counters of reward workers and services since the run began
            (`RewardPool.snapshot`)."""

    step: int = 0
    optimizer_step: int = 0
    sampler_state: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, saved_state: Mapping[str, Any]) -> Self:
        """Return the state that `for_checkpoint` has returned."""
        names = {"sampler": "sampler_state"}
        return cls(**{names.get(key, key): value for key, value in saved_state.items()})

    def for_checkpoint(self) -> dict[str, Any]:
        """Return the state in the form in which a checkpoint has it."""
        keys = {"sampler_state": "sampler"}
        return {keys.get(name, name): value for name, value in asdict(self).items()}


class RunRecorder:
    """Continues a locked run folder from its newest checkpoint and records the steps that follow.

    What a kill left behind (a torn line, a half-written checkpoint, steps after the newest
    checkpoint) is cut off first, so that every step is in every file exactly once."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        may_change: Sequence[str],
        title: str,
        facts: Sequence[str] = (),
    ):
        """Open the records of a run.

        Args:
            folder: where the run's files are.
            config: the run's settings.
            may_change: settings that may differ from the folder's.
            title: the run's name, for the live view.
            facts: short texts for its header.

        Raises:
            UserError: other settings than the run's, or no undamaged checkpoint."""
        # First, so that a mistake is not recorded as the run's settings.
        start = config.model.checkpoint
        note = checkpoint_folders.verify_initial_checkpoint(Path(start)) if start else None
        _keep_finished_steps(folder, config)
        steps_before = folder.read_config().get("run", {}).get("steps")
        folder.write_config(config.model_dump(), may_change, Config().model_dump())
        self.folder = folder
        self.state = RunState()
        check_trackers(config.run.trackers)
        self._with_tensorboard = "tensorboard" in config.run.trackers
        self._tensorboard: TensorBoardLog | None = None
        self._last_step = config.run.steps
        self._shown = partial(shown_metrics, weights=config.rewards.weights)
        self.latest_metrics: Mapping[str, Any] = {}
        """The metrics line of the newest step of this process."""
        notes = [note] if note else []
        self.checkpoints = CheckpointSeries(folder.checkpoints, config.checkpoint, notes.append)
        last_step = folder.last_step()
        self._restore_state()
        if last_step or self.is_resumed:
            notes.append(_describe_continuation(config, self.state.step, last_step, steps_before))
        history = map(self._shown, folder.read_metrics())
        self.view = LiveView(title, config.run.steps, facts=facts, history=history)
        for metrics_row in folder.read_evaluations():
            self.view.show_evaluation(self._shown(metrics_row))
        for note in notes:
            self.view.show_message(note)
        self.checkpoints.set_notify(self.view.show_message)
        tracked_run = TrackedRun(folder.path, config.run.project, config.model_dump(mode="json"))
        self._trackers = TrackerSet(config.run.trackers, tracked_run, self.view.show_message)
        self._trackers.send_history(folder.read_metrics(), folder.read_evaluations())

    @property
    def is_resumed(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self.checkpoints.latest_checkpoint is not None

    async def load(self, trainer: TrainerClient, with_reference: bool) -> None:
        """Load the newest checkpoint into the trainer; go further back where it is damaged.

        Args:
            trainer: has its ranks load the checkpoint.
            with_reference: whether the checkpoint holds a reference policy.

        Raises:
            UserError: no checkpoint is good."""
        newest_checkpoint = self.checkpoints.latest_checkpoint
        await self.checkpoints.verify(trainer)
        if self.checkpoints.latest_checkpoint != newest_checkpoint:
            self._rewind_view()
        await self.checkpoints.load(trainer, with_reference)

    def rewind(self) -> None:
        """Return to the newest checkpoint, after the ranks were lost with the steps after it."""
        self.checkpoints.reset()
        self._rewind_view()

    @timeline.timed("controller/write files")
    def record_step(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Record a finished step in all files and on the terminal."""
        self.folder.append_samples(samples)
        self.folder.append_metrics(metrics)
        if self._tensorboard:
            self._tensorboard.write(metrics)
        self._trackers.send_step(metrics)
        self.view.show_step(self._shown(metrics), samples)
        self.latest_metrics = dict(metrics)

    def advise(self, step: int, sentences: Mapping[str, str]) -> None:
        """Show and keep what should be changed, each topic once a run.

        Args:
            step: the training step that the advice is from.
            sentences: the advice by topic."""
        for topic, text in sentences.items():
            if topic not in self._advised:
                self.folder.append_advice({"step": step, "topic": topic, "text": text})
                self.view.show_message(f"step {step}: {text}")
                self._advised.add(topic)

    def record_evaluation(
        self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Record a held-out evaluation: "step" and "eval/…"."""
        self.folder.append_samples(samples)
        self.folder.append_evaluation(metrics)
        if self._tensorboard:
            self._tensorboard.write(metrics)
        self._trackers.send_evaluation(metrics)
        self.view.show_evaluation(self._shown(metrics))

    async def save(self, trainer: TrainerClient) -> None:
        """Have the trainer start to write this step's checkpoint."""
        await self.checkpoints.save(trainer, self.state.step, self.state.for_checkpoint())

    def close(self, outcome: str = "finished") -> None:
        """Close the trackers and the live view, with the word for how the run ended."""
        if self._tensorboard:
            self._tensorboard.close()
        self._trackers.close(self.state.step >= self._last_step)
        self.view.close(outcome)

    def _rewind_view(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        self._restore_state()
        files = self.folder.read_metrics(), self.folder.read_evaluations()
        self.view.rewind(*(map(self._shown, lines) for lines in files))

    def _restore_state(self) -> None:
        """Take the state of the newest checkpoint and cut every file back to its step."""
        saved_state = self.checkpoints.state()
        vars(self.state).update(vars(RunState.from_checkpoint(saved_state or {})))
        self.folder.truncate_after(self.state.step if self.is_resumed else -1)
        self._advised = {line["topic"] for line in self.folder.read_advice()}
        purge = self.state.step + 1 if self.is_resumed else None
        if self._with_tensorboard:
            self._tensorboard = TensorBoardLog(self.folder.tensorboard, purge_step=purge)


def _keep_finished_steps(folder: RunFolder, config: Config) -> None:
    """Raise UserError where `run.steps` is too small to keep the steps that a run has finished.

    Those beyond it that are newer than the newest checkpoint would be lost, as they are not done
    again."""
    newest_checkpoint, _ = checkpoint_folders.newest_usable(folder.checkpoints, "none")
    saved_step = checkpoint_folders.checkpoint_step(newest_checkpoint) if newest_checkpoint else 0
    last_step, steps = folder.last_step(), config.run.steps
    if last_step > max(saved_step, steps):
        raise UserError(
            f"run.steps: {steps} is less than the {last_step} steps that {folder.path} has "
            f"finished, and its newest checkpoint is of step {saved_step}: the run would lose "
            f"{_describe_steps(max(saved_step, steps) + 1, last_step)}. Set run.steps to "
            f"{last_step} or more, or give another run.folder",
            key="run.steps",
            cause=Cause.CONFLICT,
        )


def _describe_continuation(
    config: Config, saved_step: int, recorded: int, steps_before: int | None
) -> str:
    """Return a line that says what of a run is kept, what is done again, and why.

    Args:
        config: the recipe, which may have changed.
        saved_step: the step of the checkpoint that the run continues from, 0 without one.
        recorded: the last step that was finished.
        steps_before: `run.steps` until now."""
    steps, interval = config.run.steps, config.checkpoint.every
    parts = [f"continuing after step {saved_step}"]
    if saved_step:
        parts.append(f"{_describe_steps(1, saved_step)} kept, with their checkpoint")
    else:
        parts = [f"starting over: no checkpoint was written yet (checkpoint.every: {interval})"]
    if recorded > saved_step:
        reason = "newer than the checkpoint" if saved_step else "lost with the trainer"
        parts.append(f"{_describe_steps(saved_step + 1, recorded)} done again: {reason}")
    if steps_before not in (None, steps):
        parts.append(f"run.steps was {steps_before} and is {steps}")
    if saved_step >= steps:
        parts.append("no step is left to do")
    elif max(saved_step, recorded) < steps:
        parts.append(f"{_describe_steps(max(saved_step, recorded) + 1, steps)} to do")
    return "; ".join(parts)


def _describe_steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
