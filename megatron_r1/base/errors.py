"""Errors that end a command; those that grading raises too are its own (`r1_grading.base`)."""

from r1_grading.base.errors import Cause, RunError, UserError, did_you_mean

__all__ = ["Cause", "RunError", "TrainerError", "TrainerLost", "UserError", "did_you_mean"]


class TrainerError(RunError):
    """A trainer rank failed or vanished; the message names it and the reason."""


class TrainerLost(TrainerError):
    """The trainer ranks cannot be used any more; new ones may continue from a checkpoint."""
