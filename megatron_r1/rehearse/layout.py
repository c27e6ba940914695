"""Parallel layouts in miniature: an axis that is divided stays divided, into two."""

from collections.abc import Mapping, Sequence
from math import prod

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.models.pipeline_stages import parse_layout

SHRUNK_AXES = ("tensor", "context", "expert", "expert_tensor", "pipeline", "virtual_pipeline")
MAX_PARTS = 2
"""Size of a divided axis: the least at which every exchange along it takes place."""
OVERLAP_NEEDS = ("expert", "pipeline")
"""Axes that `parallel.overlap_expert_exchange` needs: MTP layers need the second with it."""
MAX_LAYERS = 2
"""Decoder layers of one pipeline stage; more exercise nothing that two do not."""


OMITTED_AXES = ("context", "expert_tensor", "expert", "tensor", "pipeline")
"""The order in which axes are left out: the last move most data between ranks."""


def shrink_layout(
    parallel: ParallelConfig, max_ranks: int, *, leaves_out: bool = False
) -> ParallelConfig:
    """Return the layout with each axis at most `MAX_PARTS`, and replicas of the model dropped if
    there would be more than `max_ranks` ranks otherwise. If that is not enough, axes are left out
    with `leaves_out`.

    Args:
        parallel: the recipe's layout.
        max_ranks: the most trainer ranks.
        leaves_out: whether axes may be left out.

    Raises:
        UserError: there are still more ranks."""
    for number in range(len(OMITTED_AXES) + 1):
        try:
            return _shrink_layout(parallel, max_ranks, OMITTED_AXES[:number])
        except UserError:
            if not leaves_out or number == len(OMITTED_AXES):
                raise
    raise AssertionError("unreachable")


def _shrink_layout(
    parallel: ParallelConfig, max_ranks: int, without: Sequence[str]
) -> ParallelConfig:
    sizes = {
        axis: 1 if axis in without else min(getattr(parallel, axis), MAX_PARTS)
        for axis in SHRUNK_AXES
    }
    if sizes["pipeline"] == 1:  # one rank cannot interleave chunks
        sizes["virtual_pipeline"] = 1
    layout = None
    if parallel.pipeline_layout:
        groups = _short_stages(
            parse_layout(parallel.pipeline_layout), sizes["pipeline"], parallel.pipeline
        )
        sizes["virtual_pipeline"] = len(groups) // sizes["pipeline"]
        layout = "|".join(groups)
    data_parallel_size = min(parallel.data_parallel_size(parallel.processes), MAX_PARTS)
    dense = sizes["tensor"] * sizes["context"]
    # Experts are spread over the ranks of all replicas of a stage.
    experts = sizes["expert"] * sizes["expert_tensor"]
    while dense * data_parallel_size % experts:
        data_parallel_size += 1
    if dense * data_parallel_size * sizes["pipeline"] > max_ranks and dense % experts == 0:
        data_parallel_size = 1
    world_size = dense * data_parallel_size * sizes["pipeline"]
    if world_size > max_ranks:
        raise UserError(
            f"rehearsal.max_ranks: {max_ranks} is less than the {world_size} ranks of the layout "
            f"in miniature; raise it to {world_size}",
            key="rehearsal.max_ranks",
            cause=Cause.OUT_OF_RANGE,
        )
    changes = {**sizes, "pipeline_layout": layout, "processes": world_size, "threads": 1}
    return parallel.model_copy(update=changes | _overlap_change(parallel, sizes))


def _overlap_change(parallel: ParallelConfig, sizes: Mapping[str, int]) -> dict[str, bool]:
    """Return the change that switches off the overlap of the experts' exchange where `sizes` leave
    out an axis that it may need."""
    left_out = any(sizes.get(axis, 2) == 1 < getattr(parallel, axis) for axis in OVERLAP_NEEDS)
    return {"overlap_expert_exchange": False} if left_out else {}


def _short_stages(groups: list[str], pipeline: int, original: int) -> list[str]:
    """Return fewer and shorter stages: the first one, the last one, and as many of different
    lengths between them as there is room for.

    Args:
        groups: the recipe's stages in Megatron's letters, in the order in which a micro-batch
            passes them.
        pipeline: pipeline-parallel ranks of the miniature.
        original: pipeline-parallel ranks of the recipe."""
    virtual = min(len(groups) // original, MAX_PARTS) if pipeline > 1 else 1
    count = pipeline * virtual
    inner_groups = groups[1:-1]
    kinds = list(dict.fromkeys(inner_groups)) or ["t"]
    middle = [kinds[i % len(kinds)] for i in range(max(0, count - 2))]
    single_stage = "E" + "t" * MAX_LAYERS + "m" * ("m" in "".join(groups)) + "L"
    stages = [groups[0], *middle, groups[-1]] if count > 1 else [single_stage]
    layers = [group.count("t") for group in stages]
    small_layer_counts = [min(number, MAX_LAYERS) for number in layers]
    if len(set(layers)) > len(set(small_layer_counts)) == 1:
        small_layer_counts = [
            size - (number == min(layers))
            for size, number in zip(small_layer_counts, layers, strict=True)
        ]
    return [
        group.replace("t" * number, "t" * size)
        for group, number, size in zip(stages, layers, small_layer_counts, strict=True)
    ]


def num_layers(parallel: ParallelConfig) -> int:
    """Return the number of decoder layers of a miniature: the sum over the stages of its layout, or
    two for each stage."""
    if parallel.pipeline_layout:
        return "".join(parse_layout(parallel.pipeline_layout)).count("t")
    return MAX_LAYERS * parallel.pipeline * parallel.virtual_pipeline


def different_layout(parallel: ParallelConfig) -> ParallelConfig:
    """Return a different layout for the resumed run, with fewer ranks where that is possible: one
    replica, and as few axes less as are enough for that. Otherwise it has twice as many ranks."""
    with_experts = ("tensor", "expert_tensor", "expert")
    for axes in (("tensor", "expert_tensor"), (), ("context",), ("expert",), with_experts):
        sizes = dict.fromkeys(axes, 1)
        changed = parallel.model_copy(update=sizes | _overlap_change(parallel, sizes))
        world_size = prod((changed.tensor, changed.context, changed.pipeline))
        divisor = changed.expert * changed.expert_tensor * changed.pipeline
        if world_size < parallel.processes and world_size % divisor == 0:
            return changed.model_copy(update={"processes": world_size})
    return parallel.model_copy(update={"processes": 2 * parallel.processes})


def fewer_engine_ranks(rollout: RolloutConfig) -> dict[str, int]:
    """Return the settings of the resumed run's engines: half as many, each with one copy of its
    layers on one host. Where vLLM balances experts, which takes several ranks, an engine keeps
    two of them, as a tensor group."""
    fewer = {"engines": max(1, rollout.engines // 2), "data_parallel": 1, "hosts_per_engine": 1}
    if rollout.redundant_experts and rollout.tensor_parallel == 1:
        fewer["tensor_parallel"] = MAX_PARTS
    return {key: value for key, value in fewer.items() if value != getattr(rollout, key)}


def redundant_experts(rollout: RolloutConfig, experts: int) -> int:
    """Return a number of copies of `experts` that the ranks of a miniature's engine can share. It
    is one for each rank or, with as many experts as do not divide, the least."""
    ranks = rollout.tensor_parallel * rollout.data_parallel
    if not rollout.redundant_experts or ranks == 1:
        return 0
    return -experts % ranks or ranks
