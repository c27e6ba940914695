"""The engines' layout of a recipe, and the check that a push can serve it."""

from __future__ import annotations

from megatron_r1.config import Config
from megatron_r1.engine.recipe import LAYOUT
from megatron_r1.weight_sync.plan.fp8_blocks import check_blocks
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.ranks import EngineLayout


def engine_layout(config: Config) -> EngineLayout:
    """Return the layout of all engines of a recipe."""
    return EngineLayout(**config.rollout.model_dump(include=LAYOUT | {"engines"}))


def check_pushes(config: Config, hf: dict) -> None:
    """Refuse layouts over which the trainer's weights, or their FP8 blocks, cannot be divided.

    Raises:
        UserError: names the tensor's size, and the divisors to choose from, or the setting.
    """
    layout = engine_layout(config)
    predicted = PredictedLayout(hf, layout)
    for rank in range(0, layout.ranks_per_engine, layout.tensor):  # one of each stage and copy
        for _ in predicted.needed(layout.coordinate(rank)):
            pass
    if config.push.fp8:
        parallel = config.parallel
        check_blocks(hf, layout, tensor=parallel.tensor, expert_tensor=parallel.expert_tensor)
