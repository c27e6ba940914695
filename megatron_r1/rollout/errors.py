"""The one exception of this package."""


class EngineError(RuntimeError):
    """An engine did not start, died, refused a call or answered nonsense. The message says which and where to look."""
