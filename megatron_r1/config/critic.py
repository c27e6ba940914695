"""PPO's critic: the second model of a run, which predicts a return at every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_r1.config.section import Section

if TYPE_CHECKING:
    from megatron_r1.config.recipe import Config


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


def critic_config(config: Config) -> Config:
    """The recipe as if the critic were its model."""
    critic, model, parallel = config.critic, config.model, config.parallel
    changes = {"head": "score"}
    if critic.path is not None:
        changes |= {"path": critic.path, "checkpoint": None}
    rate = {"learning_rate": critic.learning_rate}
    # A score model has no MTP layers (m), wherever the policy's stand.
    layout = parallel.pipeline_layout and parallel.pipeline_layout.replace("m", "")
    return config.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "optimizer": config.optimizer.model_copy(update=rate),
            "parallel": parallel.model_copy(update={"pipeline_layout": layout}),
        }
    )
