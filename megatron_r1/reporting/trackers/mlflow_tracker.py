"""MLflow as a tracker, at `MLFLOW_TRACKING_URI`, else in `mlflow/` of the run's folder."""

import os
import re
import time
from collections.abc import Mapping

from megatron_r1.config.setting_keys import flatten_sections
from megatron_r1.reporting.trackers.tracker import EVALUATION, STEP_METRIC, TrackedRun

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
            values = [
                Param(k, str(v)[:MLFLOW_MAX_CHARS])
                for k, v in flatten_sections(run.settings).items()
            ]
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
