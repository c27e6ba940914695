"""FP8 pushes: the tensors an engine then has, and layouts in which every block has one owner.

A block of 128 x 128 has one scale, so it is quantised by a rank that holds all of it, and goes
whole to an engine rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_r1.weight_sync.plan.engine_layout import EngineLayout, EngineNeeds
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.tensors import Tensor, tensors
from megatron_r1.weights.layout import hf_tensors, table
from megatron_r1.weights.rules import Shape, whole
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantised, scale_name, scale_shape

STAY = "or set push.fp8: false"
FUSED_FIRST = ("gate_proj", "q_a_proj", "k_proj", "q_proj")
"""vLLM lays another projection behind these in one matrix, and wants that to begin a block."""


def pushed_tensors(hf: dict, *, fp8: bool) -> list[tuple[str, Shape]]:
    """Name and shape of what a checkpoint of the model `hf` describes holds, plain or in FP8."""
    found: list[tuple[str, Shape]] = []
    for name, (shape, _) in hf_tensors(hf, with_mtp=False).items():
        found.append((name, shape))
        if fp8 and is_quantised(name):
            found.append((scale_name(name), scale_shape(shape)))
    return found


def scales_of(region: Region) -> Region:
    """Where the scales of these whole blocks lie in the tensor of scales."""
    return Region(
        region.top // BLOCK, -(-region.bottom // BLOCK),
        region.left // BLOCK, -(-region.right // BLOCK),
    )  # fmt: skip


def cut(region: Region, shape: Shape) -> int | None:
    """The first row or column at which a region's edge cuts a block of a tensor of `shape`."""
    for edge, size in (
        (region.top, shape[0]),
        (region.bottom, shape[0]),
        (region.left, shape[1]),
        (region.right, shape[1]),
    ):
        if edge % BLOCK and edge != size:
            return edge
    return None


def check_blocks(hf: dict, engines: EngineLayout, *, tensor: int, expert_tensor: int) -> None:
    """Refuse layouts that cut blocks; tensor, expert_tensor: sizes of the trainer's.

    Raises:
        ValueError: names the tensor, its size and the setting.
    """
    for item, region in _trainer_regions(hf, tensor, expert_tensor):
        of_expert = item.expert is not None
        name, size = ("expert_tensor", expert_tensor) if of_expert else ("tensor", tensor)
        at = cut(region, item.shape)
        if at is not None and size == 1:
            raise ValueError(
                f"push.fp8: Megatron keeps {item.name} {item.shape} in parts that end at {at}, "
                f"within a block of {BLOCK}: a model with heads of {at} cannot be pushed in FP8; "
                "set push.fp8: false"
            )
        _refuse(item, at, f"parallel.{name}={size}")
    needs = EngineNeeds(hf, engines)
    for rank in range(0, engines.ranks_per_engine, engines.tensor):
        for item, region in _quantised(needs.needed(engines.place(rank))):
            size = engines.tensor
            setting = f"rollout.tensor={size}"
            if item.expert is not None and not engines.expert_parallel:
                setting += f" x rollout.data={engines.data} (or rollout.expert_parallel: true)"
            _refuse(item, cut(region, item.shape), setting)
            if _is_fused_first(item) and region.bottom % BLOCK:
                raise ValueError(
                    f"push.fp8: {item.name} {item.shape} does not end with a block of {BLOCK}, and "
                    "vLLM lays the next projection behind it in the same matrix: set push.fp8: "
                    "false"
                )


def _refuse(item: Tensor, at: int | None, setting: str) -> None:
    if at is not None:
        raise ValueError(
            f"push.fp8: {setting} cuts {item.name} {item.shape} at {at}, within a block of "
            f"{BLOCK} x {BLOCK}, which has one scale: lower it, {STAY}"
        )


def _trainer_regions(hf: dict, tensor: int, expert_tensor: int) -> Iterator[tuple[Tensor, Region]]:
    rules = table(hf)
    for item in tensors(rules, {"layers"}, range(len(rules.layers)), (0,)):
        if not is_quantised(item.name) or item.rule.split is whole:
            continue
        source, ranks = item.rule.sources[item.source], tensor
        if item.expert is not None:
            ranks = expert_tensor
        for rank in range(ranks):
            for piece in item.rule.split(item.rule.sources, rank, ranks)[1]:
                if piece.hf_name == source.name:
                    yield item, Region.of(piece, item.shape)


def _quantised(needed: Iterable[tuple[Tensor, Region]]) -> Iterator[tuple[Tensor, Region]]:
    return (found for found in needed if is_quantised(found[0].name))


def _is_fused_first(item: Tensor) -> bool:
    name = item.name.split(".")[-2]
    alone = name == "q_proj" and len(item.rule.sources) == 1
    return name in FUSED_FIRST and not alone
