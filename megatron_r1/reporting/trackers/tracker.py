"""A tracker of a run's metrics, and the arguments with which it is opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.base.files import atomic_write

STEP_METRIC, EVALUATION = "step", "eval/step"
"""Metrics with the number of a line's step; a tracked run has the newest of each."""


@dataclass(frozen=True)
class TrackedRun:
    """The arguments with which a tracker is opened.

    Attributes:
        folder: the run's folder, whose name becomes the name of the tracked run.
        project: W&B's project, MLflow's experiment.
        settings: the recipe."""

    folder: Path
    project: str
    settings: Mapping[str, Any]

    def load_id(self, tracker: str) -> str | None:
        """Return the tracked run's id, which an earlier start of the run kept."""
        return self._saved_ids().get(tracker)

    def save_id(self, tracker: str, identity: str) -> None:
        """Keep the tracked run's id for the next start."""
        ids = self._saved_ids() | {tracker: identity}
        atomic_write(self.folder / "trackers.json", json.dumps(ids) + "\n")

    def _saved_ids(self) -> dict[str, str]:
        path = self.folder / "trackers.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Tracker(Protocol):
    """A tracked run that is open. All calls come from one thread, and may raise anything."""

    @property
    def tracked_steps(self) -> Mapping[str, float]:
        """The newest step of `STEP_METRIC` and `EVALUATION` that was tracked when it was opened."""

    @property
    def notes(self) -> list[str]:
        """Return messages for the user about the tracker's start."""

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a line."""

    def finish(self, is_finished: bool) -> None:
        """End the tracked run.

        Args:
            is_finished: whether the run reached its last step."""
