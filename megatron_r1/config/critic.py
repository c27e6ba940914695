"""Section `critic`: PPO's second model."""

from pydantic import Field

from megatron_r1.config.section import Scheduled, Section


class CriticConfig(Section):
    """PPO's critic, a second model that predicts the return at every token."""

    path: str | None = None
    """Hugging Face folder that the critic starts from: a language or a reward model with the
    policy's tokenizer; default: the policy's first weights"""
    learning_rate: Scheduled[float] = Field(1e-5, gt=0)
    """the critic's own, which decays as the policy's does"""
    value_clip: float | None = Field(0.2, gt=0)
    """how far a value may move from the rollout's before it is no longer pushed (arXiv 2005.12729,
    section 3); null: not limited"""
    warmup_steps: int = Field(0, ge=0)
    """first steps, in rollouts (not updates), that train the critic alone"""
