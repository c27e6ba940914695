"""Records a run (folder, checkpoints, trackers, terminal) and restores where it was left.

`CheckpointSeries` is the controller's part of checkpoints: it chooses the one to continue from, and
saves them."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, TrainerError, UserError
from megatron_r1.base.processes import timeline
from megatron_r1.config import CheckpointConfig, Config
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.reporting.formatting import shown_metrics
from megatron_r1.reporting.live import LiveView
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.trackers import TrackerSet, check_trackers
from megatron_r1.reporting.trackers.services import TensorBoardLog, TrackedRun
from megatron_r1.trainer.checkpoints import checkpoint_folders
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, DamagedCheckpoint
from megatron_r1.trainer.operations import CheckpointOperations


@dataclass
class RunState:
    """The controller's state across restarts; saved inside every checkpoint.

    Attributes:
        step: finished steps.
        optimizer_step: finished updates, which the learning rate depends on.
        sampler: position in the data.
        rewards: counters of reward workers and services since the run began
            (`RewardPool.snapshot`)."""

    step: int = 0
    optimizer_step: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, int] = field(default_factory=dict)


@dataclass
class _PendingSave:
    """A checkpoint being written. seconds_blocked: how long the run has waited for it so far."""

    folder: Path
    step: int
    seconds_blocked: float


class CheckpointSeries:
    """The checkpoints of one run.

    Attributes:
        latest: the newest checkpoint known to be whole, or None.
        notify: called with lines for the user."""

    def __init__(self, folder: Path, settings: CheckpointConfig, notify: Callable[[str], None]):
        """Choose the newest checkpoint whose manifest, files and sizes are right.

        Args:
            folder: the folder of the checkpoints.
            settings: the recipe's section.
            notify: called with lines for the user.

        Raises:
            UserError: all checkpoints are damaged.
        """
        self._folder, self._settings, self.notify = folder, settings, notify
        self.latest: Path | None = None
        self.reset()

    def reset(self) -> None:
        """Choose the newest good checkpoint again, after the ranks were lost. A checkpoint that
        they were writing counts only if it became whole.

        Raises:
            UserError: all checkpoints are damaged.
        """
        for name in checkpoint_folders.remove_partial(self._folder):
            self.notify(f"{name} was still being written when the run ended; removed")
        self._choose(*self._newest())
        self._saving: _PendingSave | None = None
        self._completed: dict[str, float] = {}

    def state(self) -> dict[str, Any] | None:
        """Return the controller's state in `latest`; None at the start of a run."""
        if self.latest is None:
            return None
        return json.loads((self.latest / STATE_FILE).read_text(encoding="utf-8"))

    async def verify(self, trainer: TrainerClient) -> None:
        """Have the ranks verify `latest`; fall back to older ones until one is as it was written.

        Raises:
            UserError: no checkpoint is as it was written.
        """
        damaged: list[DamagedCheckpoint] = []
        candidate = self.latest
        while candidate is not None:
            answer = await trainer.call(
                CheckpointOperations.verify_checkpoint, folder=str(candidate)
            )
            if not answer["faults"]:
                break
            damaged.append(DamagedCheckpoint(candidate, tuple(answer["faults"])))
            candidate, between = self._newest(below=candidate)
            damaged += between
        self._choose(candidate, damaged)

    async def load(self, trainer: TrainerClient, reference: bool) -> None:
        """Have the ranks load `latest`, after `verify`."""
        answer = await trainer.call(
            CheckpointOperations.load_checkpoint, folder=str(self.latest), reference=reference
        )
        if not answer["is_same_layout"]:
            self.notify("another parallel layout than before: random streams are seeded anew")

    async def save(self, trainer: TrainerClient, step: int, state: dict[str, Any]) -> None:
        """Start the checkpoint of `step`; unless `checkpoint.asynchronous`, wait until it is whole.

        Waits for the previous one first.

        Args:
            trainer: the ranks.
            step: the finished steps.
            state: the controller's state, JSON values.

        Raises:
            TrainerError: the previous checkpoint, or this one, failed.
        """
        began = time.perf_counter()
        await self._poll(trainer, wait=True)
        folder = checkpoint_folders.checkpoint_path(self._folder, step)
        await trainer.call(CheckpointOperations.save_checkpoint, folder=str(folder), state=state)
        self._saving = _PendingSave(folder, step, time.perf_counter() - began)
        if not self._settings.asynchronous:
            await self._poll(trainer, wait=True)

    async def completed_metrics(self, trainer: TrainerClient) -> dict[str, float]:
        """Return the metrics of a checkpoint that became whole since the last call, else {}:
        checkpoint/step, checkpoint/seconds (until whole) and checkpoint/seconds_blocked (that the
        run waited).

        Raises:
            TrainerError: the checkpoint could not be written.
        """
        await self._poll(trainer, wait=False)
        metrics, self._completed = self._completed, {}
        return metrics

    async def finish(self, trainer: TrainerClient) -> None:
        """Wait for the checkpoint being written.

        Raises:
            TrainerError: the checkpoint could not be written.
        """
        await self._poll(trainer, wait=True)

    async def _poll(self, trainer: TrainerClient, wait: bool) -> None:
        if self._saving is None:
            return
        began = time.perf_counter()
        progress = await trainer.call(CheckpointOperations.checkpoint_progress, wait=wait)
        if not progress["is_done"]:
            return
        saving, self._saving = self._saving, None
        if progress["error"] is not None:
            raise TrainerError(progress["error"])
        if wait:
            saving.seconds_blocked += time.perf_counter() - began
        self._completed = {
            "checkpoint/step": saving.step,
            "checkpoint/seconds_blocked": saving.seconds_blocked,
            "checkpoint/seconds": progress["seconds"],
        }
        self.latest = saving.folder
        # In a thread: deleting a large folder must not hold up the sampling.
        settings = self._settings
        await asyncio.to_thread(
            checkpoint_folders.prune, self._folder, settings.keep, settings.keep_every
        )

    def _newest(self, below: Path | None = None) -> tuple[Path | None, list[DamagedCheckpoint]]:
        return checkpoint_folders.newest_usable(self._folder, self._settings.verify, below)

    def _choose(self, good: Path | None, damaged: list[DamagedCheckpoint]) -> None:
        """Continue from `good` and set the newer, `damaged` ones aside.

        Raises:
            UserError: `good` is None and there are damaged ones.
        """
        if good is None:
            checkpoint_folders.require_usable(self._folder, damaged)
        self.latest = good
        for one in damaged:
            target = checkpoint_folders.set_aside(one)
            self.notify(f"DAMAGED checkpoint, not used: {one}. It is now {target.name}")
        if good is not None and damaged:
            self.notify(f"continuing from {good.name} instead")


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
            folder: the run's.
            config: the run's settings.
            may_change: settings that may differ from the folder's.
            title: for the terminal.
            facts: for the terminal.

        Raises:
            UserError: other settings than the run's, or no undamaged checkpoint."""
        # First, so that a mistake is not recorded as the run's settings.
        start = config.model.checkpoint
        note = checkpoint_folders.check_initial_checkpoint(Path(start)) if start else None
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
        self.latest: Mapping[str, Any] = {}
        """The metrics line of the newest step of this process."""
        notes = [note] if note else []
        self.checkpoints = CheckpointSeries(folder.checkpoints, config.checkpoint, notes.append)
        recorded = folder.last_step()
        self._restore_state()
        if recorded or self.resumed:
            notes.append(_continuation(config, self.state.step, recorded, steps_before))
        history = map(self._shown, folder.read_metrics())
        self.view = LiveView(title, config.run.steps, facts=facts, history=history)
        for line in folder.read_evaluations():
            self.view.show_evaluation(self._shown(line))
        for note in notes:
            self.view.show_message(note)
        self.checkpoints.notify = self.view.show_message
        tracked = TrackedRun(folder.path, config.run.project, config.model_dump(mode="json"))
        self._trackers = TrackerSet(config.run.trackers, tracked, self.view.show_message)
        self._trackers.send_history(folder.read_metrics(), folder.read_evaluations())

    @property
    def resumed(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self.checkpoints.latest is not None

    async def load(self, trainer: TrainerClient, reference: bool) -> None:
        """Load the newest checkpoint into the trainer; go further back where it is damaged.

        Args:
            trainer: the ranks.
            reference: whether the checkpoint holds a reference policy.

        Raises:
            UserError: no checkpoint is good."""
        newest = self.checkpoints.latest
        await self.checkpoints.verify(trainer)
        if self.checkpoints.latest != newest:
            self._rewind_view()
        await self.checkpoints.load(trainer, reference)

    def rewind(self) -> None:
        """Return to the newest checkpoint, after the ranks were lost with the steps after it."""
        self.checkpoints.reset()
        self._rewind_view()

    @timeline.timed("controller/write files")
    def step(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Record a finished step in all files and on the terminal."""
        self.folder.append_samples(samples)
        self.folder.append_metrics(metrics)
        if self._tensorboard:
            self._tensorboard.write(metrics)
        self._trackers.send_step(metrics)
        self.view.show_step(self._shown(metrics), samples)
        self.latest = dict(metrics)

    def advise(self, step: int, sentences: Mapping[str, str]) -> None:
        """Show and keep what should be changed, each topic once a run.

        Args:
            step: the training step.
            sentences: topic → sentence."""
        for topic, text in sentences.items():
            if topic not in self._advised:
                self.folder.append_advice({"step": step, "topic": topic, "text": text})
                self.view.show_message(f"step {step}: {text}")
                self._advised.add(topic)

    def evaluation(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Record a held-out evaluation: "step" and "eval/…"."""
        self.folder.append_samples(samples)
        self.folder.append_evaluation(metrics)
        if self._tensorboard:
            self._tensorboard.write(metrics)
        self._trackers.send_evaluation(metrics)
        self.view.show_evaluation(self._shown(metrics))

    async def save(self, trainer: TrainerClient) -> None:
        """Have the trainer start to write this step's checkpoint."""
        await self.checkpoints.save(trainer, self.state.step, asdict(self.state))

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
        lines = self.folder.read_metrics(), self.folder.read_evaluations()
        self.view.rewind(*(map(self._shown, each) for each in lines))

    def _restore_state(self) -> None:
        """Take the state of the newest checkpoint and cut every file back to its step."""
        saved = self.checkpoints.state()
        vars(self.state).update(vars(RunState(**saved or {})))
        self.folder.truncate_after(self.state.step if self.resumed else -1)
        self._advised = {line["topic"] for line in self.folder.read_advice()}
        purge = self.state.step + 1 if self.resumed else None
        if self._with_tensorboard:
            self._tensorboard = TensorBoardLog(self.folder.tensorboard, purge_step=purge)


def _keep_finished_steps(folder: RunFolder, config: Config) -> None:
    """Raise UserError where `run.steps` is less than the steps that a run has finished, and those
    beyond it would be lost: they are newer than the newest checkpoint, and not done again."""
    newest, _ = checkpoint_folders.newest_usable(folder.checkpoints, "none")
    kept = checkpoint_folders.checkpoint_step(newest) if newest else 0
    recorded, steps = folder.last_step(), config.run.steps
    if recorded > max(kept, steps):
        raise UserError(
            f"run.steps: {steps} is less than the {recorded} steps that {folder.path} has "
            f"finished, and its newest checkpoint is of step {kept}: the run would lose "
            f"{_steps(max(kept, steps) + 1, recorded)}. Set run.steps to {recorded} or more, or "
            "give another run.folder",
            key="run.steps",
            cause=Cause.CONFLICT,
        )


def _continuation(config: Config, kept: int, recorded: int, steps_before: int | None) -> str:
    """Return a line that says what of a run is kept, what is done again, and why.

    Args:
        config: the recipe, which may have changed.
        kept: the step of the checkpoint that the run continues from, 0 without one.
        recorded: the last step that was finished.
        steps_before: `run.steps` until now."""
    steps, every = config.run.steps, config.checkpoint.every
    parts = [f"continuing after step {kept}"]
    if kept:
        parts.append(f"{_steps(1, kept)} kept, with their checkpoint")
    else:
        parts = [f"starting over: no checkpoint was written yet (checkpoint.every: {every})"]
    if recorded > kept:
        why = "newer than the checkpoint" if kept else "lost with the trainer"
        parts.append(f"{_steps(kept + 1, recorded)} done again: {why}")
    if steps_before not in (None, steps):
        parts.append(f"run.steps was {steps_before} and is {steps}")
    if kept >= steps:
        parts.append("no step is left to do")
    elif max(kept, recorded) < steps:
        parts.append(f"{_steps(max(kept, recorded) + 1, steps)} to do")
    return "; ".join(parts)


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
