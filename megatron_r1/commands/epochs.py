"""Training on examples for so many passes over them."""

from __future__ import annotations

import math
from typing import Literal

from megatron_r1.config import Config


def with_steps(config: Config, section: Literal["sft", "reward_model"], epoch_size: int) -> Config:
    """The configuration with the `run.steps` that the section's `epochs` means; the last batch may
    begin another epoch. Raises ValueError where the recipe says another number."""
    settings = getattr(config, section)
    if settings.epochs is None:
        return config
    # The rounding: 0.1 x 30 must not become 4 batches of one.
    num_examples = round(settings.epochs * epoch_size, 6)
    steps = max(1, math.ceil(num_examples / settings.batch_size))
    if "steps" in config.run.model_fields_set and config.run.steps != steps:
        raise ValueError(
            f"{section}.epochs: {settings.epochs:g} epochs of {epoch_size:,} examples are "
            f"{steps:,} batches, and run.steps is {config.run.steps:,}; leave one of them out"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
