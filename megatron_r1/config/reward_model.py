"""Section `reward_model`: the training of a reward model."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from r1_grading.reading import Part, check_template

from megatron_r1.config.section import Section


class RewardModelConfig(Section):
    """The training of a reward model: its data, loss and the part of a response that it scores.

    The defaults are DeepSeek-R1's (arXiv 2501.12948 v2, section 3.1 and supplement B.3)."""

    data: str = ""
    """JSONL or Parquet of {question, chosen, rejected} or of {question, response, label}; required
    by reward-model. See docs/reward_models.md"""
    kind: Literal["pairwise", "pointwise"] = "pairwise"
    """the loss: Bradley-Terry on pairs, or cross entropy on labels"""
    part: Part | None = None
    """part of a response that is scored; default: summary for pairwise (R1's helpful), response for
    pointwise (its safety)"""
    template: Annotated[str | None, AfterValidator(check_template)] = None
    """text with {question} and {response}, special tokens included; the score is read at its last
    token; default: the tokenizer's chat template"""
    max_chars: int = Field(20_000, ge=100)
    """a longer response is shown without its middle, as in serving"""
    max_tokens: int | None = Field(None, gt=0)
    """longer texts are left out; default: the model's own limit"""
    epochs: float | None = Field(None, gt=0)
    """instead of run.steps: passes over the training rows (the paper: 1)"""
    batch_size: int = Field(256, gt=0)
    """pairs, or labelled responses, per step"""
    heldout_fraction: float = Field(0.1, ge=0, lt=1)
    """share of the prompts that is held out, by their question"""

    @property
    def scored_part(self) -> Part:
        """The part of a response that is scored."""
        return self.part or ("summary" if self.kind == "pairwise" else "response")
