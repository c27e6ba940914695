"""The entries and links that a recipe's push is planned with, before any engine runs."""

from collections.abc import Sequence

from megatron_r1.config import Config
from megatron_r1.config.push import PushConfig
from megatron_r1.weight_sync.plan.bundles import LARGEST_BUNDLE, largest_bundle
from megatron_r1.weight_sync.plan.checks import engine_layout
from megatron_r1.weight_sync.plan.engine_sets import SET_ENGINES, Entry, engine_sets, entries
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.ranks import TrainerGrid
from megatron_r1.weight_sync.plan.shared_gpus import (
    NONE_SHARED,
    RANKS_PER_NODE,
    shared_in_order,
)
from megatron_r1.weight_sync.plan.traffic import CountBytes, fp8_bytes, plain_bytes
from megatron_r1.weights.layout import recipe_stages


def max_engines(push: PushConfig) -> int:
    """Return how many engines form a set at most."""
    return 1 if push.on_one_host else SET_ENGINES


def engine_rank_bytes(config: Config, hf: dict) -> int:
    """Return the pushed bytes of an engine's first rank, which has the most; its receive buffer has
    as many, twice that on a CPU."""
    layout, push = engine_layout(config), config.push
    needs = PredictedLayout(hf, layout, drafts=config.rollout.drafts_by_mtp)
    count_bytes = fp8_bytes if push.fp8 else plain_bytes(config.rollout.dtype)
    return sum(
        count_bytes(item.name, item.rule.dtype, region)
        for item, region in needs.needed(layout.coordinate(0))
    )


def shares_gpus_over_nccl(config: Config) -> bool:
    """Return whether engine ranks are on the trainer ranks' GPUs and pushes go over NCCL, which
    refuses a pair of ranks on one GPU."""
    return config.rollout.colocated and config.push.transport == "nccl"


def planned_entries(
    planner: Planner,
    count_bytes: CountBytes,
    sets: Sequence[range],
    *,
    shares_gpus: bool,
    ranks_per_node: int = RANKS_PER_NODE,
    largest: float = LARGEST_BUNDLE,
) -> list[list[list[Entry]]]:
    """Return the `entries` of engines that do not run yet.

    shares_gpus: see `shares_gpus_over_nccl`; the plan then avoids pairs on one GPU, with the
    engines' ranks on the trainer ranks' GPUs in order, `ranks_per_node` in a node."""
    shared = NONE_SHARED
    if shares_gpus:
        world, ranks = planner.grid.world, planner.engines.ranks_per_engine
        shared = shared_in_order(sets, ranks, world, ranks_per_node)
    return entries(planner, count_bytes, sets, (), largest, shared)


def planned_push(config: Config, hf: dict) -> list[list[list[Entry]]]:
    """Return the `entries` of a recipe's push from `parallel.processes` trainer ranks."""
    layout, push = engine_layout(config), config.push
    grid = TrainerGrid.from_recipe(config.parallel, config.parallel.processes)
    needs = PredictedLayout(hf, layout, drafts=config.rollout.drafts_by_mtp)
    planner = Planner(hf, grid, layout, recipe_stages(config, hf), needs)
    return planned_entries(
        planner,
        fp8_bytes if push.fp8 else plain_bytes(config.rollout.dtype),
        engine_sets(layout.engines, max_engines(push)),
        shares_gpus=shares_gpus_over_nccl(config),
        largest=largest_bundle(push.transport),
    )
