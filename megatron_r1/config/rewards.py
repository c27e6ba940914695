"""The rewards (`rewards`): their terms, weights and options, and the workers that grade.

The default weights are R1-Zero's (arXiv 2501.12948 v2, section 2)."""

from typing import Annotated, Any

from pydantic import Field, field_validator
from r1_grading.reading import READING_REWARDS, Reading
from r1_grading.terms import DEFAULT_WEIGHTS, ScheduledWeight, read_options, read_weights

from megatron_r1.config.section import Resumable, ResumableMark, Scheduled, Section


class RewardsConfig(Section):
    """The terms of the reward with their weights, and the workers that grade."""

    weights: Scheduled[dict[str, float | ScheduledWeight]] = dict(DEFAULT_WEIGHTS)
    """reward = sum of weight x term: a number, or {weight, from_step, to_step}"""
    # The addresses of served models may change, for where they run decides nothing.
    options: Annotated[
        dict[str, dict[str, Any]], ResumableMark(("helpful.url", "judge.url", "safety.url"))
    ] = {}
    """{reward: its options}, such as language: {target: zh}"""
    reading: Reading = "strict"
    """where the final answer of mathematics and logic is read. strict: R1-Zero's, `<answer>`, else
    a box, else a last line that is the answer; tags, boxed, last: there alone; auto: the first of
    these three that is there, for models that were not taught tags. See docs/rewards.md"""
    max_ungraded: Resumable[float] = Field(0.1, ge=0, le=1)
    """share of a rollout's responses that graders may fail on, rounded up; with more the run
    stops"""
    workers: Resumable[int] = Field(2, ge=1)
    """grader processes"""
    timeout_seconds: float = Field(5.0, gt=0)
    """limit for one response; then its grader is killed and the response gets 0"""
    memory_gib: float = Field(4.0, gt=0)
    """address space of one grader"""

    @property
    def call_options(self) -> dict[str, dict[str, Any]]:
        """The `options`, with `reading` for the rewards that read a final answer."""
        if self.reading == "strict":
            return self.options
        reading_option = {"reading": self.reading}
        return self.options | {
            kind: reading_option | self.options.get(kind, {}) for kind in READING_REWARDS
        }

    @property
    def memory_bytes(self) -> int:
        """The memory limit of a worker, in bytes."""
        return int(self.memory_gib * 1024**3)

    @field_validator("weights", mode="before")
    @classmethod
    def _read_weights(cls, weights: Any) -> Any:
        return read_weights(weights) if isinstance(weights, dict) else weights

    @field_validator("options", mode="before")
    @classmethod
    def _read_options(cls, options: Any) -> Any:
        return read_options(options) if isinstance(options, dict) else options
