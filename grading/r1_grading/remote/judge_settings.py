"""The settings of a judge."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from r1_grading.base.errors import Cause, UserError
from r1_grading.reading import Part
from r1_grading.remote.settings import ServiceSettings

DEFAULT_VOTES = {"verify": 3, "compare": 4}


class JudgeSettings(ServiceSettings):
    """Settings of `judge`, as a reward and for preference pairs."""

    mode: Literal["verify", "compare"] = Field(
        "verify", description="against a reference answer, or against another response"
    )
    votes: int | None = Field(None, ge=1, description="default: 3 to verify, 4 to compare")
    temperature: float | None = Field(0.6, ge=0, description="null: the service's own")
    max_tokens: int | None = Field(4096, gt=0, description="limit of a judgement; null: not sent")
    part: Part = Field("summary", description="shown: what follows the thought, or the response")
    cache: str | None = Field(None, description="folder that keeps the judge's replies")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="more keys of the request; one that is null is left out"
    )

    @model_validator(mode="after")
    def _votes_can_decide(self) -> Self:
        if self.num_votes % 2 != (self.mode == "verify"):
            need = {
                "verify": "odd to verify, so that there is a majority",
                "compare": "even to compare, so that each response is shown first equally often",
            }
            message = f"votes must be {need[self.mode]}; got {self.votes}"
            raise UserError(message, key="votes", cause=Cause.CONFLICT)
        return self

    @property
    def num_votes(self) -> int:
        """Replies per verdict: `votes`, or the default of the mode."""
        return DEFAULT_VOTES[self.mode] if self.votes is None else self.votes
