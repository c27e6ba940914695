"""What engines do wrong."""


class EngineError(RuntimeError):
    """An engine did not start, died, refused a call or answered nonsense. The message says which,
    and where to look.

    `status` is the HTTP status if there was an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EngineDied(EngineError):
    """The engine's process has ended, or does nothing any more: another may do what it was asked
    for."""


class EngineTimeout(EngineError):
    """No answer in the time that a request may take."""


class EngineFault(EngineError):
    """The engine lives, but what came back cannot be used: a dropped connection, an error of its
    own, or an answer that does not add up. Worth asking again."""


class ConnectionBroken(EngineFault):
    """There is no answer, and nobody knows how far the engine came with what it was asked for."""
