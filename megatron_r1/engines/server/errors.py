"""The errors that a request to an engine, or its start, ends in."""

from __future__ import annotations

from megatron_r1.base.errors import RunError


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


class PushIncomplete(EngineFault):
    """The engine did not get all of a push, and still has the weights before it."""

    KIND = "incomplete_push"
    """"kind" of the reply (`engines.plugin.weight_swap`)."""


class ConnectionBroken(EngineFault):
    """The connection broke before the reply: the engine may or may not have executed the call."""
