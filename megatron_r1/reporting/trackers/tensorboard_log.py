"""TensorBoard's event files, by its own writer, without torch or tensorflow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_r1.reporting.record_values import finite_metric


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
            self._add_event(Event(step=purge_step, session_log=start))
            self._writer.flush()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of one step's metrics (with its "step") and flush them to the file."""
        values = [
            Summary.Value(tag=key, simple_value=float(value))
            for key, value in metrics.items()
            if key != "step" and finite_metric(metrics, key) is not None
        ]
        self._add_event(Event(step=int(metrics["step"]), summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close the file."""
        self._writer.close()

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
