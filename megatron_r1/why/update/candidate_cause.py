"""Holds a candidate cause of updates that depart: one thing that may have been computed
otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CandidateCause:
    """One thing that may have been computed otherwise in the updates of a step.

    The updates are recomputed with the other values in place of the settings'.

    Attributes:
        name: what is computed otherwise, in words.
        setting: the setting whose value it replaces. All candidates of one setting may explain a
            departure.
        remedy: the setting or file to change where it explains a departure.
        loss: fields of `LossRules` with other values.
        adam: fields of `AdamRules`, likewise.
        advantages: by response, in place of the step's; None: the step's.
        reference: "" for the checkpoint's, else "policy" (the policy before the step) or "begin"
            (the model that the run began with).
        loses_moments: begin with moments of zero, and with Adam's counter at 0.
        repeats_first: every update is on the first mini-batch.
        rows_without_gradient: rows whose gradient is lost.
        trains_prompts: the prompt's tokens are trained on, too.
        routes_itself: the trainer chooses the experts, though those of the engine are replayed.
        unties_head: a tied head is a tensor of its own, whose gradient the embedding lacks."""

    name: str
    setting: str = ""
    remedy: str = ""
    loss: tuple[tuple[str, Any], ...] = ()
    adam: tuple[tuple[str, Any], ...] = ()
    advantages: Sequence[Sequence[float]] | None = None
    reference: str = ""
    loses_moments: bool = False
    repeats_first: bool = False
    rows_without_gradient: Sequence[int] = ()
    trains_prompts: bool = False
    routes_itself: bool = False
    unties_head: bool = False

    @property
    def has_loss_of_settings(self) -> bool:
        """Whether the optimizer alone is another: the first gradient is that of the settings."""
        return not (
            self.loss
            or self.advantages is not None
            or self.reference
            or self.rows_without_gradient
            or self.trains_prompts
            or self.routes_itself
            or self.unties_head
        )

    @property
    def remedy_or_setting(self) -> str:
        """What to change where this explains a departure."""
        return self.remedy or self.setting


def other_values(values: Sequence[str], present_value: str) -> list[str]:
    """Return the values that a setting does not have."""
    return [value for value in values if value != present_value]
