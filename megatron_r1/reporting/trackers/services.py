"""The trackers of a run's figures: what one is, TensorBoard's event files (by its own writer,
without torch or tensorflow), and the services of `run.trackers`, Weights & Biases and MLflow.

Weights & Biases is online, or offline (`WANDB_MODE=offline`) for a later `wandb sync`. MLflow is at
`MLFLOW_TRACKING_URI`, else in `mlflow/` of the run's folder."""

import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.config.section import flatten
from megatron_r1.reporting.formatting import finite_metric

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
        return self._ids().get(tracker)

    def save_id(self, tracker: str, identity: str) -> None:
        """Keep the tracked run's id for the next start."""
        ids = self._ids() | {tracker: identity}
        atomic_write(self.folder / "trackers.json", json.dumps(ids) + "\n")

    def _ids(self) -> dict[str, str]:
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


MLFLOW = "mlflow"
MLFLOW_MAX_PARAMETERS = 100
MLFLOW_MAX_CHARS = 500
"""Limits of MLflow for a batch of parameters, and for a value that all of its stores take."""
MLFLOW_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in the name of a metric; each becomes `_`, as in `eval/pass_1`."""
MLFLOW_DEFAULTS = {
    # With MLflow's own limits a line takes minutes while a server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Allows plain files in `mlflow/`; a database store needs packages that mlflow-skinny lacks.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}


class MlflowTracker:
    """Sends each line as a batch of metrics of its step."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the tracked run, or create it.

        Raises:
            Exception: what mlflow raises.
        """
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow
        from mlflow.entities import Metric, Param

        self.notes: list[str] = []
        self._metric = Metric
        local_uri = (run.folder / "mlflow").resolve().as_uri()
        tracking_uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else local_uri
        self._client = mlflow.MlflowClient(tracking_uri)
        identity = run.load_id(MLFLOW)
        if identity is None:
            experiment = self._client.get_experiment_by_name(run.project)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(run.project)
            )
            tracked_run = self._client.create_run(experiment_id, run_name=run.folder.name)
            identity = tracked_run.info.run_id
            run.save_id(MLFLOW, identity)
            values = [Param(k, str(v)[:MLFLOW_MAX_CHARS]) for k, v in flatten(run.settings).items()]
            for start in range(0, len(values), MLFLOW_MAX_PARAMETERS):
                self._client.log_batch(
                    identity, params=values[start : start + MLFLOW_MAX_PARAMETERS]
                )
        self._identity = identity
        self._client.update_run(identity, status="RUNNING")
        tracked_metrics = self._client.get_run(identity).data.metrics
        self.tracked_steps = {
            key: tracked_metrics[key] for key in (STEP_METRIC, EVALUATION) if key in tracked_metrics
        }

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log a step's numbers under the names that MLflow allows."""
        milliseconds = int(time.time() * 1000)
        metrics = [
            self._metric(MLFLOW_NOT_ALLOWED.sub("_", name), value, milliseconds, step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self._identity, metrics=metrics)

    def finish(self, is_finished: bool) -> None:
        """Mark the run as FINISHED or KILLED."""
        self._client.set_terminated(self._identity, "FINISHED" if is_finished else "KILLED")


WANDB = "wandb"
WANDB_START_SECONDS = 30
WANDB_FINISH_SECONDS = 30


def check_wandb() -> None:
    """Raise UserError where W&B would need a key and has none. Touches no network."""
    import wandb

    if wandb.setup().settings.mode in (None, "online", "shared") and not wandb.login(
        prompt=False, verify=False
    ):
        raise UserError(
            "run.trackers: wandb has no API key: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline, which writes to the run's folder for `wandb sync`",
            key="WANDB_API_KEY",
            cause=Cause.MISSING,
        )


class WandbTracker:
    """Sends each line with its own step: a resumed run adds to the one that it was.

    Offline, W&B begins a new folder at each start, which then gets all lines again: the newest has
    the whole run."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the tracked run, offline where the server cannot be reached.

        Raises:
            Exception: what wandb raises.
        """
        import wandb
        from wandb.errors import CommError

        identity = run.load_id(WANDB)
        if identity is None:
            identity = secrets.token_hex(4)
            run.save_id(WANDB, identity)
        options: dict[str, Any] = {
            "project": run.project,
            "name": run.folder.name,
            "id": identity,
            "resume": "allow",
            "dir": str(run.folder),
            "config": dict(run.settings),
        }
        # The live view redraws the terminal, and W&B would record every frame.
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "init_timeout": WANDB_START_SECONDS,
        }
        settings["finish_timeout"] = WANDB_FINISH_SECONDS
        self.notes: list[str] = []
        try:
            self._run = wandb.init(**options, settings=wandb.Settings(**settings))
        except (CommError, TimeoutError) as error:
            wandb.teardown()  # else its service counts the id as in use
            offline = wandb.Settings(**settings, mode="offline")
            self._run = wandb.init(**options, settings=offline)
            reason = str(error).splitlines()[0]
            self.notes.append(
                f"wandb: the server cannot be reached ({reason}); recorded offline: wandb sync "
                f"{run.folder}/wandb/latest-run"
            )
        self._run.define_metric("*", step_metric=STEP_METRIC)
        self._run.define_metric("eval/*", step_metric=EVALUATION)
        summary: dict[str, Any] = dict(self._run.summary)
        self.tracked_steps = {
            key: float(summary[key]) for key in (STEP_METRIC, EVALUATION) if key in summary
        }

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log a step's numbers."""
        self._run.log(dict(numbers))

    def finish(self, is_finished: bool) -> None:
        """End the run, with exit code 0 only if it finished."""
        self._run.finish(exit_code=0 if is_finished else 1)


class TensorBoardLog:
    """Writes every number of a metrics line as a scalar, to one event file per process."""

    def __init__(self, folder: str | Path, purge_step: int | None = None):
        """Open the log; an earlier process may have written to it.

        TensorBoard drops what an earlier process wrote at `purge_step` and after (SessionLog START,
        as in its event_accumulator.py), so that no step is shown twice.

        Args:
            folder: the folder of the event files.
            purge_step: on resume, the first step to be written again (checkpoint step + 1)."""
        self._writer = EventFileWriter(str(folder))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=purge_step, session_log=start))
            self._writer.flush()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of one step's metrics (with its "step") and flush them to the file."""
        values = [
            Summary.Value(tag=key, simple_value=float(value))
            for key, value in metrics.items()
            if key != "step" and finite_metric(metrics, key) is not None
        ]
        self._add(Event(step=int(metrics["step"]), summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close the file."""
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
