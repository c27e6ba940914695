"""The controller's part: which checkpoint a run continues from, and one save at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config import CheckpointConfig
from megatron_r1.errors import TrainerError
from megatron_r1.training.checkpoints import finding
from megatron_r1.training.checkpoints.finding import STATE_FILE, Damaged
from megatron_r1.training.client import TrainerClient


@dataclass
class _Saving:
    """A checkpoint on its way. seconds_blocked: that the run waited for it so far."""

    folder: Path
    step: int
    seconds_blocked: float


class CheckpointSeries:
    """The checkpoints of one run. `latest`: the newest that is known to be whole.

    say: gets the lines a person has to see.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, say: Callable[[str], None]):
        """Finds the newest checkpoint whose manifest, files and sizes are right.

        Raises ValueError when there are damaged ones only."""
        self._folder, self._settings, self.say = folder, settings, say
        self.start_again()

    def start_again(self) -> None:
        """Take the newest good checkpoint; forget the one that ranks which are gone were writing,
        unless it became whole. Raises ValueError when there are damaged ones only."""
        for name in finding.remove_partial(self._folder):
            self.say(f"{name} was still being written when the run ended; removed")
        self._take(*self._newest())
        self._saving: _Saving | None = None
        self._news: dict[str, float] = {}

    def state(self) -> dict[str, Any] | None:
        """What the controller put into `latest`; None where the run begins."""
        if self.latest is None:
            return None
        return json.loads((self.latest / STATE_FILE).read_text(encoding="utf-8"))

    async def verify(self, trainer: TrainerClient) -> None:
        """Have the ranks verify `latest`; falls back to older ones until one is as it was written.

        Raises ValueError when none is."""
        damaged: list[Damaged] = []
        candidate = self.latest
        while candidate is not None:
            answer = await trainer.call("verify_checkpoint", folder=str(candidate))
            if not answer["damage"]:
                break
            damaged.append(Damaged(candidate, tuple(answer["damage"])))
            candidate, between = self._newest(below=candidate)
            damaged += between
        self._take(candidate, damaged)

    async def load(self, trainer: TrainerClient, reference: bool) -> None:
        """Have the ranks load `latest`, which `verify` has found good."""
        answer = await trainer.call("load_checkpoint", folder=str(self.latest), reference=reference)
        if not answer["is_same_layout"]:
            self.say("another parallel layout than before: random streams are seeded anew")

    async def save(self, trainer: TrainerClient, step: int, state: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`; ends at once unless `checkpoint.asynchronous` is off.

        Waits for the one before. Raises TrainerError when that one, or this one, failed."""
        began = time.perf_counter()
        await self._learn(trainer, wait=True)
        folder = finding.path_of(self._folder, step)
        await trainer.call("save_checkpoint", folder=str(folder), state=state)
        self._saving = _Saving(folder, step, time.perf_counter() - began)
        if not self._settings.asynchronous:
            await self._learn(trainer, wait=True)

    async def news(self, trainer: TrainerClient) -> dict[str, float]:
        """Of a checkpoint that became whole since the last call: checkpoint/step, /seconds until it
        was, and /seconds_blocked, for which the run waited.

        Raises TrainerError when it could not be written."""
        await self._learn(trainer, wait=False)
        news, self._news = self._news, {}
        return news

    async def finish(self, trainer: TrainerClient) -> None:
        """Wait for the checkpoint on its way. Raises TrainerError when it could not be written."""
        await self._learn(trainer, wait=True)

    async def _learn(self, trainer: TrainerClient, wait: bool) -> None:
        if self._saving is None:
            return
        began = time.perf_counter()
        progress = await trainer.call("checkpoint_progress", wait=wait)
        if not progress["is_done"]:
            return
        saving, self._saving = self._saving, None
        if progress["error"] is not None:
            raise TrainerError(progress["error"])
        if wait:
            saving.seconds_blocked += time.perf_counter() - began
        self._news = {
            "checkpoint/step": saving.step,
            "checkpoint/seconds_blocked": saving.seconds_blocked,
            "checkpoint/seconds": progress["seconds"],
        }
        self.latest = saving.folder
        await asyncio.to_thread(finding.prune, self._folder, self._settings.keep)

    def _newest(self, below: Path | None = None) -> tuple[Path | None, list[Damaged]]:
        return finding.newest(self._folder, self._settings.verify, below)

    def _take(self, good: Path | None, damaged: list[Damaged]) -> None:
        """Continue from `good`; what is damaged above it is set aside, or all there is."""
        if good is None:
            finding.refuse_without_good(self._folder, damaged)
        self.latest = good
        for one in damaged:
            target = finding.set_aside(one)
            self.say(f"DAMAGED checkpoint, not used: {one}. It is now {target.name}")
        if good is not None and damaged:
            self.say(f"continuing from {good.name} instead")
