"""PPO's critic: the second model of a run, which predicts a return at every token."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.section import Section


class CriticConfig(Section):
    path: str | None = Field(
        None,
        description="Hugging Face folder it starts from, of a language or a reward model with the "
        "policy's tokenizer; default: the policy's first weights",
    )
    learning_rate: float = Field(1e-5, gt=0, description="the policy's decay holds for it too")
    value_clip: float | None = Field(
        0.2,
        gt=0,
        description="how far a value may move from the rollout's before it is no longer pushed "
        "(arXiv 2005.12729, section 3); null: not limited",
    )
    warmup_steps: int = Field(
        0, ge=0, description="rollouts at the start from which the critic alone learns"
    )
