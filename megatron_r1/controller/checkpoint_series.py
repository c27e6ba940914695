"""Writes the checkpoints of any run while it trains, and chooses the one to continue from."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import TrainerError
from megatron_r1.config import CheckpointConfig
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.trainer.checkpoints import checkpoint_folders
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, DamagedCheckpoint
from megatron_r1.trainer.operations import CheckpointOperations


@dataclass
class _PendingSave:
    """A checkpoint being written. seconds_blocked: how long the run has waited for it so far."""

    folder: Path
    step: int
    seconds_blocked: float


class CheckpointSeries:
    """The checkpoints of one run.

    Attributes:
        latest_checkpoint: the newest checkpoint known to be whole, or None."""

    def __init__(self, folder: Path, settings: CheckpointConfig, notify: Callable[[str], None]):
        """Choose the newest checkpoint whose manifest, files and sizes are right.

        Args:
            folder: the folder of the checkpoints.
            settings: the recipe's section.
            notify: called with lines for the user.

        Raises:
            UserError: all checkpoints are damaged.
        """
        self._folder, self._settings, self._notify = folder, settings, notify
        self.latest_checkpoint: Path | None = None
        self.reset()

    def set_notify(self, notify: Callable[[str], None]) -> None:
        """Call `notify` with lines for the user from now on."""
        self._notify = notify

    def reset(self) -> None:
        """Choose the newest good checkpoint again, after the ranks were lost. A checkpoint that
        they were writing counts only if it became whole.

        Raises:
            UserError: all checkpoints are damaged.
        """
        for name in checkpoint_folders.remove_partial(self._folder):
            self._notify(f"{name} was still being written when the run ended; removed")
        self._choose_checkpoint(*self._newest_usable())
        self._saving: _PendingSave | None = None
        self._completed: dict[str, float] = {}

    def state(self) -> dict[str, Any] | None:
        """Return the controller's state in `latest_checkpoint`; None at the start of a run."""
        if self.latest_checkpoint is None:
            return None
        return json.loads((self.latest_checkpoint / STATE_FILE).read_text(encoding="utf-8"))

    async def verify(self, trainer: TrainerClient) -> None:
        """Have the ranks verify `latest_checkpoint`; fall back to older ones until one is as it was
        written.

        Raises:
            UserError: no checkpoint is as it was written.
        """
        damaged_checkpoints: list[DamagedCheckpoint] = []
        candidate = self.latest_checkpoint
        while candidate is not None:
            reply = await trainer.call(
                CheckpointOperations.verify_checkpoint, folder=str(candidate)
            )
            if not reply["faults"]:
                break
            damaged_checkpoints.append(DamagedCheckpoint(candidate, tuple(reply["faults"])))
            candidate, passed_over = self._newest_usable(bound=candidate)
            damaged_checkpoints += passed_over
        self._choose_checkpoint(candidate, damaged_checkpoints)

    async def load(self, trainer: TrainerClient, with_reference: bool) -> None:
        """Have the ranks load `latest_checkpoint`, after `verify`."""
        reply = await trainer.call(
            CheckpointOperations.load_checkpoint,
            folder=str(self.latest_checkpoint),
            with_reference=with_reference,
        )
        if not reply["is_same_layout"]:
            self._notify("another parallel layout than before: random streams are seeded anew")

    async def save(self, trainer: TrainerClient, step: int, state: dict[str, Any]) -> None:
        """Start the checkpoint of `step`; unless `checkpoint.asynchronous`, wait until it is whole.

        Waits for the previous one first.

        Args:
            trainer: has its ranks save what they hold.
            step: the number of finished steps.
            state: the controller's state, JSON values.

        Raises:
            TrainerError: the previous checkpoint, or this one, failed.
        """
        started_at = time.perf_counter()
        await self._poll_save(trainer, wait=True)
        folder = checkpoint_folders.checkpoint_path(self._folder, step)
        await trainer.call(CheckpointOperations.save_checkpoint, folder=str(folder), state=state)
        self._saving = _PendingSave(folder, step, time.perf_counter() - started_at)
        if not self._settings.asynchronous:
            await self._poll_save(trainer, wait=True)

    async def completed_metrics(self, trainer: TrainerClient) -> dict[str, float]:
        """Return the metrics of a checkpoint that became whole since the last call, else {}:
        checkpoint/step, checkpoint/seconds (until whole) and checkpoint/seconds_blocked (that the
        run waited).

        Raises:
            TrainerError: the checkpoint could not be written.
        """
        await self._poll_save(trainer, wait=False)
        metrics, self._completed = self._completed, {}
        return metrics

    async def finish(self, trainer: TrainerClient) -> None:
        """Wait for the checkpoint being written.

        Raises:
            TrainerError: the checkpoint could not be written.
        """
        await self._poll_save(trainer, wait=True)

    async def _poll_save(self, trainer: TrainerClient, wait: bool) -> None:
        if self._saving is None:
            return
        started_at = time.perf_counter()
        progress = await trainer.call(CheckpointOperations.checkpoint_progress, wait=wait)
        if not progress["is_done"]:
            return
        pending_save, self._saving = self._saving, None
        if progress["error"] is not None:
            raise TrainerError(progress["error"])
        if wait:
            pending_save.seconds_blocked += time.perf_counter() - started_at
        self._completed = {
            "checkpoint/step": pending_save.step,
            "checkpoint/seconds_blocked": pending_save.seconds_blocked,
            "checkpoint/seconds": progress["seconds"],
        }
        self.latest_checkpoint = pending_save.folder
        # In a thread: deleting a large folder must not hold up the sampling.
        settings = self._settings
        await asyncio.to_thread(
            checkpoint_folders.prune, self._folder, settings.keep, settings.keep_every
        )

    def _newest_usable(
        self, bound: Path | None = None
    ) -> tuple[Path | None, list[DamagedCheckpoint]]:
        return checkpoint_folders.newest_usable(self._folder, self._settings.verify, bound)

    def _choose_checkpoint(self, good: Path | None, damaged: list[DamagedCheckpoint]) -> None:
        """Continue from `good` and set the newer, `damaged` ones aside.

        Raises:
            UserError: `good` is None and there are damaged ones.
        """
        if good is None:
            checkpoint_folders.require_usable(self._folder, damaged)
        self.latest_checkpoint = good
        for checkpoint in damaged:
            target = checkpoint_folders.set_aside(checkpoint)
            self._notify(f"DAMAGED checkpoint, not used: {checkpoint}. It is now {target.name}")
        if good is not None and damaged:
            self._notify(f"continuing from {good.name} instead")
