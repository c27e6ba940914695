"""FP8 pushes: the tensors that an engine in FP8 takes, and regions of whole blocks.

A block of 128 x 128 has one scale, so a rank that holds all of a block quantizes it and sends it
whole to an engine rank."""

from megatron_r1.weight_sync.plan.tensors import Region
from megatron_r1.weights.decoder import table
from megatron_r1.weights.layout import hf_tensors
from megatron_r1.weights.rules import Shape
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantized, scale_name, scale_shape


def pushed_tensors(hf: dict, *, fp8: bool, drafts: bool = False) -> list[tuple[str, Shape]]:
    """Return the names and shapes of the tensors in a checkpoint of the model, plain or in FP8.

    drafts: with the tensors of the MTP layers, but without their copies of embedding and head,
    which the drafter shares with the model."""
    names_and_shapes: list[tuple[str, Shape]] = []
    copies = table(hf).copies
    for name, (shape, _) in hf_tensors(hf, with_mtp=drafts).items():
        if name in copies:
            continue
        names_and_shapes.append((name, shape))
        if fp8 and is_quantized(name):
            names_and_shapes.append((scale_name(name), scale_shape(shape)))
    return names_and_shapes


def scale_region(region: Region) -> Region:
    """Return the region of the tensor of scales that belongs to these whole blocks."""
    return Region(
        region.top // BLOCK, -(-region.bottom // BLOCK),
        region.left // BLOCK, -(-region.right // BLOCK),
    )  # fmt: skip


def first_cut(region: Region, shape: Shape) -> int | None:
    """Return the first row or column at which `region` cuts a block of a tensor of `shape`."""
    edges = ((region.top, 0), (region.bottom, 0), (region.left, 1), (region.right, 1))
    return next((edge for edge, dim in edges if edge % BLOCK and edge != shape[dim]), None)
