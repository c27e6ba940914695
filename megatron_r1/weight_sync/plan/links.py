"""The links between ranks that a recipe's push is planned with."""

from megatron_r1.config import Config
from megatron_r1.config.push import PushConfig
from megatron_r1.weight_sync.plan.checks import engine_layout
from megatron_r1.weight_sync.plan.entry import (
    SET_ENGINES,
    engine_sets,
    entries,
    largest_over,
    neighbours_in_order,
    num_links,
)
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.ranks import TrainerGrid
from megatron_r1.weight_sync.plan.traffic import fp8_bytes, plain_bytes
from megatron_r1.weights.layout import recipe_stages


def max_engines(push: PushConfig) -> int:
    """Return how many engines form a set at most."""
    return 1 if push.on_one_host or push.delta else SET_ENGINES


def planned_links(config: Config, hf: dict) -> list[int]:
    """Return the number of links to engine ranks of each of `parallel.processes` trainer ranks."""
    layout, push = engine_layout(config), config.push
    grid = TrainerGrid.of(config.parallel, config.parallel.processes)
    needs = PredictedLayout(hf, layout, drafts=config.rollout.drafts_by_mtp)
    planner = Planner(hf, grid, layout, recipe_stages(config, hf), needs)
    count = fp8_bytes if push.fp8 else plain_bytes(config.rollout.dtype)
    sets = engine_sets(layout.engines, max_engines(push))
    is_near = config.rollout.colocated and push.transport == "nccl"
    near = neighbours_in_order(sets, layout.ranks_per_engine, grid.world) if is_near else {}
    plans = entries(planner, count, sets, (), largest_over(push.transport), near)
    return num_links(plans, grid.world)
