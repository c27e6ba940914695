"""The engines' layout that a recipe's settings give, and the layouts a push cannot serve."""

from __future__ import annotations

from megatron_r1.config import Config
from megatron_r1.engine.parallelism import LAYOUT
from megatron_r1.weight_sync.plan.engine_layout import EngineLayout, EngineNeeds
from megatron_r1.weight_sync.plan.fp8_blocks import check_blocks


def engine_layout(config: Config) -> EngineLayout:
    """All engines, as the recipe has them."""
    return EngineLayout(**config.rollout.model_dump(include=LAYOUT | {"engines"}))


def check_pushes(config: Config, hf: dict) -> None:
    """Refuse ranks between which the trainer's weights cannot be divided, or not in FP8 blocks.

    Raises:
        ValueError: names the tensor's size, and the divisors to choose from, or the setting.
    """
    layout = engine_layout(config)
    needs = EngineNeeds(hf, layout)
    for rank in range(0, layout.ranks_per_engine, layout.tensor):  # one of each stage and copy
        for _ in needs.needed(layout.place(rank)):
            pass
    if config.push.fp8:
        parallel = config.parallel
        check_blocks(hf, layout, tensor=parallel.tensor, expert_tensor=parallel.expert_tensor)
