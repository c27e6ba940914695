"""A recipe's push before any engine runs: the engines' layout, the planned links and bytes, and the
checks that a push can serve the recipe."""

from collections.abc import Iterator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config
from megatron_r1.config.engine import LAYOUT_KEYS
from megatron_r1.config.push import PushConfig
from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.weights.formats.published_layout import FP8_BLOCK_SIZE, is_quantized
from megatron_r1.models.weights.layout import recipe_stages
from megatron_r1.models.weights.splits import replicated
from megatron_r1.models.weights.table import weight_table
from megatron_r1.push.matching.adapter_push import (
    PredictedAdapterSharding,
    check_adapter_push,
    pushed_adapter_table,
)
from megatron_r1.push.matching.layouts import EngineLayout, TrainerGrid
from megatron_r1.push.matching.matched_regions import MatchedRegions
from megatron_r1.push.matching.planned_links import (
    MAX_SET_ENGINES,
    EngineSetPlan,
    engine_sets,
    max_group_fraction,
    plan_sets,
)
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.regions import Region, first_unaligned_edge
from megatron_r1.push.matching.tensors import (
    CountBytes,
    HFTensor,
    checkpoint_tensors,
    fp8_bytes,
    plain_bytes,
)


def max_engines(push: PushConfig) -> int:
    """Return how many engines form a set at most."""
    return 1 if push.on_one_node else MAX_SET_ENGINES


def engine_rank_bytes(config: Config, hf_config: HFConfig) -> int:
    """Return the pushed bytes of an engine's first rank, which has the most. Its receive buffer has
    as many, twice that on a CPU, where weights are used there."""
    layout, push = engine_layout(config), config.push
    sharding = predicted_sharding(config, hf_config, layout)
    count_bytes = fp8_bytes if push.fp8 else plain_bytes(config.rollout.dtype)
    return bytes_of_first_rank(sharding, layout, count_bytes)


def bytes_of_first_rank(
    sharding: PredictedSharding, layout: EngineLayout, count_bytes: CountBytes
) -> int:
    """Return the bytes that the first rank of an engine needs, which has the most.

    Args:
        sharding: which regions each rank of the engine needs.
        layout: the engine's parallel layout.
        count_bytes: the bytes of a region, from its tensor's name and dtype."""
    return sum(
        count_bytes(item.name, item.rule.dtype, region)
        for item, region in sharding.regions_of(layout.coordinate(0))
    )


def engine_weight_bytes(config: Config, hf_config: HFConfig) -> int:
    """Return the bytes of the model's weights on an engine's first rank, pushed or read."""
    layout = engine_layout(config)
    sharding = PredictedSharding(hf_config, layout, drafts=config.rollout.drafts_by_mtp)
    count_bytes = fp8_bytes if config.push.fp8 else plain_bytes(config.rollout.dtype)
    return bytes_of_first_rank(sharding, layout, count_bytes)


def shares_gpus_over_nccl(config: Config) -> bool:
    """Return whether engine ranks are on the trainer ranks' GPUs and pushes go over NCCL, which
    refuses a pair of ranks on one GPU."""
    return config.rollout.colocated and TRANSPORTS[config.push.transport].sends_in_rounds


def planned_push(config: Config, hf_config: HFConfig) -> list[EngineSetPlan]:
    """Return the plans of the sets of a recipe's push from `parallel.processes` trainer ranks."""
    layout, push = engine_layout(config), config.push
    grid = TrainerGrid.from_recipe(config.parallel, config.parallel.processes)
    matched_regions = _regions_of_recipe(config, hf_config, grid, layout)
    return plan_sets(
        matched_regions,
        fp8_bytes if push.fp8 else plain_bytes(config.rollout.dtype),
        engine_sets(layout.engines, max_engines(push)),
        max_fraction=max_group_fraction(push.transport),
    )


FUSED_FIRST = ("gate_proj", "q_a_proj", "k_proj", "q_proj")
"""Projections that vLLM stores in one matrix with a second one after them; the second must begin at
a block."""


def engine_layout(config: Config) -> EngineLayout:
    """Return how the recipe's engines divide the model: engines, and ranks of each by axis."""
    keys = LAYOUT_KEYS | {"engines", "redundant_experts"}
    return EngineLayout(**config.rollout.model_dump(include=keys))


def check_pushes(config: Config, hf_config: HFConfig, world_size: int) -> None:
    """Refuse layouts over which the trainer's weights, or their FP8 blocks, cannot be divided.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`.
        world_size: the trainer ranks; under torchrun not `parallel.processes`.

    Raises:
        UserError: names the tensor's size, and the divisors to choose from, or the setting.
    """
    check_drafter(config)
    check_adapter_push(config, hf_config)
    layout = engine_layout(config)
    sharding = predicted_sharding(config, hf_config, layout)
    grid = TrainerGrid.from_recipe(config.parallel, world_size)
    _regions_of_recipe(config, hf_config, grid, layout)  # as every trainer rank does
    sharding.check_divisible()
    if config.push.fp8:
        parallel = config.parallel
        check_blocks(
            hf_config, layout, tensor=parallel.tensor, expert_tensor=parallel.expert_tensor
        )


def predicted_sharding(
    config: Config, hf_config: HFConfig, layout: EngineLayout
) -> PredictedSharding:
    """Return what the ranks of a recipe's engines need of a push, in engines of `layout`.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`.
        layout: the layout of all engines.

    Raises:
        UserError: where vLLM cannot split the model so."""
    if (table := pushed_adapter_table(config, hf_config)) is not None:
        return PredictedAdapterSharding(hf_config, layout, table)
    return PredictedSharding(hf_config, layout, drafts=config.rollout.drafts_by_mtp)


def _regions_of_recipe(
    config: Config, hf_config: HFConfig, grid: TrainerGrid, layout: EngineLayout
) -> MatchedRegions:
    sharding = predicted_sharding(config, hf_config, layout)
    table = pushed_adapter_table(config, hf_config)
    return MatchedRegions(
        hf_config, grid, layout, recipe_stages(config, hf_config), sharding, table
    )


def check_drafter(config: Config) -> None:
    """Refuse engines that draft with MTP layers which the trainer does not have, with UserError."""
    if config.rollout.drafts_by_mtp and config.model.mtp == "none":
        raise UserError(
            "rollout.speculative.method: mtp, but model.mtp: none leaves out the MTP layers, so "
            "the engines' drafter would get no weights; set model.mtp: frozen or train, or "
            "rollout.speculative.method: ngram or none",
            key="rollout.speculative.method",
            cause=Cause.CONFLICT,
        )


def check_blocks(
    hf_config: HFConfig, layout: EngineLayout, *, tensor: int, expert_tensor: int
) -> None:
    """Refuse layouts that cut blocks, and models without them.

    Args:
        hf_config: the model's config.json.
        layout: the layout of the engines.
        tensor: the trainer's tensor-parallel size.
        expert_tensor: the trainer's expert-tensor-parallel size.

    Raises:
        UserError: names the tensor, its size and the setting."""
    if model_family(hf_config).stacked_experts:
        raise UserError(
            f"push.fp8: {hf_config['architectures'][0]} has no FP8 layout; set push.fp8: false",
            key="push.fp8",
            cause=Cause.UNSUPPORTED,
        )
    for item, region in _trainer_regions(hf_config, tensor, expert_tensor):
        is_expert = item.expert is not None
        name, size = ("expert_tensor", expert_tensor) if is_expert else ("tensor", tensor)
        unaligned_edge = first_unaligned_edge(region, item.shape)
        if unaligned_edge is not None and size == 1:
            raise UserError(
                f"push.fp8: Megatron keeps {item.name} {item.shape} in parts that end at "
                f"{unaligned_edge}, within a block of {FP8_BLOCK_SIZE}: a model with heads of "
                f"{unaligned_edge} cannot be pushed in FP8; "
                "set push.fp8: false",
                key="push.fp8",
                cause=Cause.INDIVISIBLE,
            )
        _check_aligned(item, region, f"parallel.{name}={size}")
    sharding = PredictedSharding(hf_config, layout)
    for rank in range(0, layout.ranks_per_engine, layout.tensor_parallel):
        for item, region in sharding.regions_of(layout.coordinate(rank)):
            if not is_quantized(item.name):
                continue
            setting = f"rollout.tensor_parallel={layout.tensor_parallel}"
            if item.expert is not None and not layout.expert_parallel:
                setting += f" x rollout.data_parallel={layout.data_parallel}"
                setting += " (or rollout.expert_parallel: true)"
            _check_aligned(item, region, setting)
            if _is_fused_first(item) and region.bottom % FP8_BLOCK_SIZE:
                raise UserError(
                    f"push.fp8: {item.name} {item.shape} does not end with a block of "
                    f"{FP8_BLOCK_SIZE}, and "
                    "vLLM stores the next projection behind it in the same matrix: set push.fp8: "
                    "false",
                    key="push.fp8",
                    cause=Cause.INDIVISIBLE,
                )


def _check_aligned(item: HFTensor, region: Region, setting: str) -> None:
    unaligned_edge = first_unaligned_edge(region, item.shape)
    if unaligned_edge is not None:
        raise UserError(
            f"push.fp8: {setting} cuts {item.name} {item.shape} at {unaligned_edge}, within a "
            f"block of {FP8_BLOCK_SIZE} x {FP8_BLOCK_SIZE}, which has one scale: lower it, or set "
            "push.fp8: false",
            key="push.fp8",
            cause=Cause.INDIVISIBLE,
        )


def _trainer_regions(
    hf_config: HFConfig, tensor: int, expert_tensor: int
) -> Iterator[tuple[HFTensor, Region]]:
    """Yield every region of a quantized tensor that a trainer rank holds, of one expert only."""
    table = weight_table(hf_config)
    for item in checkpoint_tensors(table, {"layers"}, range(len(table.layers)), (0,)):
        if not is_quantized(item.name) or item.rule.split is replicated:
            continue
        source = item.rule.sources[item.source]
        ranks = tensor if item.expert is None else expert_tensor
        for rank in range(ranks):
            for piece in item.rule.split(item.rule.sources, rank, ranks)[1]:
                if piece.hf_name == source.name:
                    yield item, Region.from_piece(piece, item.shape)


def _is_fused_first(item: HFTensor) -> bool:
    name = item.name.split(".")[-2]
    is_unfused = name == "q_proj" and len(item.rule.sources) == 1
    return name in FUSED_FIRST and not is_unfused
