"""Errors that end a command. `UserError` and `RunError` come from `r1_grading.base.errors`, the
trainer's are defined here."""

from r1_grading.base.errors import Cause, RunError, UserError, did_you_mean

__all__ = ["Cause", "RunError", "TrainerError", "TrainerLost", "UserError", "did_you_mean"]


class TrainerError(RunError):
    """A trainer rank failed or vanished; the message names it and the reason."""


class TrainerLost(TrainerError):
    """The trainer ranks cannot be used any more; new ones may continue from a checkpoint."""
