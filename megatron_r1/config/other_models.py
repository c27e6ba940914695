"""The models that a run trains beside or instead of its policy: a critic, a reward model."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_r1.config.section import Section
from megatron_r1.rewards.remote.response_text import Part, check_template


class CriticConfig(Section):
    """PPO's critic, a second model that predicts the return at every token."""

    path: str | None = None
    """Hugging Face folder that the critic starts from: a language or a reward model with the
    policy's tokenizer; default: the policy's first weights"""
    learning_rate: float = Field(1e-5, gt=0)
    """the critic's own, which decays as the policy's does"""
    value_clip: float | None = Field(0.2, gt=0)
    """how far a value may move from the rollout's before it is no longer pushed (arXiv 2005.12729,
    section 3); null: not limited"""
    warmup_steps: int = Field(0, ge=0)
    """number of first rollouts that train the critic alone"""


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
    template: str | None = None
    """text with {question} and {response}, special tokens included; the score is read at its last
    token; default: the tokenizer's chat template"""
    max_chars: int = Field(20_000, ge=100)
    """a longer response is shown without its middle, as in serving"""
    max_tokens: int | None = Field(None, gt=0)
    """longer texts are left out; default: the model's own limit"""
    epochs: float | None = Field(None, gt=0)
    """instead of run.steps: passes over the training rows (the paper: 1)"""
    batch_size: int = Field(256, gt=0, description="pairs, or labelled responses, per step")
    heldout_fraction: float = Field(0.1, ge=0, lt=1)
    """share of the questions that is held out, by their text"""

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, template: str | None) -> str | None:
        return check_template(template)

    @property
    def shown(self) -> Part:
        """The part of a response that is scored."""
        return self.part or ("summary" if self.kind == "pairwise" else "response")
