"""The errors that a request to an engine, or its start, ends in."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_r1.base.errors import RunError
from megatron_r1.base.processes.log_excerpts import file_excerpt


class EngineError(RunError):
    """An engine did not start, died, refused a call or gave an unusable reply. The message names
    the engine and, where it helps, its log.

    `status` is the HTTP status if there was a reply."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EngineDied(EngineError):
    """The engine's process has ended or hangs: another engine may serve the request."""

    KIND = "core_ended"
    """"kind" of the reply of a server whose core has ended (`engines.plugin.weight_swap`)."""


class WeightsUnavailable(EngineError):
    """The trainer's ranks are gone, so that a new engine gets its weights only when they have
    started again. No fault of the engine's."""


class EngineTimeout(EngineError):
    """No reply within `timeout_seconds`."""


class EngineFault(EngineError):
    """The engine lives, but its reply is unusable: a dropped connection, an internal error, or a
    malformed response. The request is worth repeating."""


class EngineLacksPush(EngineFault):
    """The engine did not get all of a push, and still has the weights before it."""

    KIND = "incomplete_push"
    """"kind" of the reply (`engines.plugin.weight_swap`)."""


class ConnectionBroken(EngineFault):
    """The connection broke before the reply: the engine may or may not have executed the call."""


def with_log_excerpt(error: EngineError, log_folder: Path, engine: str) -> str:
    """Return an error with an excerpt of the engine's log, for where the log is removed next.

    Args:
        error: what a call of the engine raised.
        log_folder: the folder of the log; its path is left out.
        engine: the engine's name."""
    log = log_folder / f"{engine}.log"
    reason = str(error).replace(f"{log_folder}{os.sep}", "")
    if log.name not in reason and log.is_file():
        reason += f"; from {log.name}:\n{file_excerpt(log)}"
    return reason
