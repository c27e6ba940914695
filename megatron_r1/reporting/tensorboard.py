"""Scalars for TensorBoard, written with its own event writer, without torch or tensorflow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_r1.reporting.wording import finite


class TensorBoardLog:
    """Writes every number of a metrics line as a scalar, to one event file per process."""

    def __init__(self, folder: str | Path, purge_step: int | None = None):
        """purge_step: on resume, the first step that will be written again (checkpoint step + 1).

        TensorBoard then drops what an earlier process wrote at that step and after (SessionLog
        START, as in its event_accumulator.py), so that no step is shown twice."""
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
            if key != "step" and finite(metrics, key) is not None
        ]
        self._add(Event(step=int(metrics["step"]), summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
