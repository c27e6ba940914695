"""All trackers that a recipe names in `run.trackers`: sends them the metrics of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.reporting.trackers.background_tracker import BackgroundTracker
from megatron_r1.reporting.trackers.mlflow_tracker import MLFLOW, MlflowTracker
from megatron_r1.reporting.trackers.tracker import EVALUATION, STEP_METRIC, TrackedRun, Tracker
from megatron_r1.reporting.trackers.wandb_tracker import WANDB, WandbTracker, check_wandb

OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    WANDB: WandbTracker,
    MLFLOW: MlflowTracker,
}
TRACKER_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for a tracker whose library is not installed, or that has no key."""
    for name in names:
        if name in OPENERS and find_spec(name) is None:
            raise UserError(
                f"run.trackers: {name} needs a package that is not installed: pip install "
                f"{TRACKER_PACKAGES[name]}, or leave {name} out",
                key="run.trackers",
                cause=Cause.NOT_INSTALLED,
            )
    if WANDB in names:
        check_wandb()


class TrackerSet:
    """Sends the lines of metrics.jsonl and evaluations.jsonl to every tracker.

    The files are the truth: each start sends the lines that a tracked run lacks, so that a crash of
    the run, of the tracker or of the network loses none.

    Args:
        names: the values of `run.trackers`.
        run: what is tracked, with the ids that trackers gave it.
        notify: shows a message.
    """

    def __init__(
        self, names: Sequence[str], run: TrackedRun, notify: Callable[[str], None]
    ) -> None:
        self._notify = notify
        tracked_names = [name for name in names if name in OPENERS]
        self._trackers = [
            BackgroundTracker(name, partial(OPENERS[name], run)) for name in tracked_names
        ]

    def send_history(
        self, steps: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
    ) -> None:
        """Send the lines that earlier starts of the run have written and that are not tracked
        yet."""
        for line in steps:
            self._add_line(STEP_METRIC, line)
        for line in evaluations:
            self._add_line(EVALUATION, line)

    def send_step(self, metrics: Mapping[str, Any]) -> None:
        """Send the line of a step."""
        self._add_line(STEP_METRIC, metrics)

    def send_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Send the line of an evaluation."""
        self._add_line(EVALUATION, metrics)

    def close(self, is_finished: bool) -> None:
        """Send the rest and end the tracked runs.

        Args:
            is_finished: whether the run is at its last step."""
        for tracker in self._trackers:
            tracker.close(is_finished)
        self._show_notes()

    def _add_line(self, key: str, line: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.add(key, line)
        self._show_notes()

    def _show_notes(self) -> None:
        for tracker in self._trackers:
            for note in tracker.notes():
                self._notify(note)
