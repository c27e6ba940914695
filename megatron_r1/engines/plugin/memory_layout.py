"""The offset of each parameter in the receive buffer, and the table of slots for the trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1.engines.plugin.loader_copies import CheckpointParameter, LoaderCopy
from megatron_r1.push.slots import Slot, SlotTable

ALIGNMENT_BYTES = 64
"""Bytes; parameters begin at multiples of these: they are views of the memory while their layers
load."""
GAP_BYTES = 128
"""The gap between the rows of a matrix that `with_gaps` spreads."""


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter in checkpoint form, and its offset in the receive buffer.

    Attributes:
        parameter: its layer and name, and the shape, strides and dtype of a view of the memory.
        offset: its first byte in the memory.
        num_rows: the rows that are received; all others are a vocabulary's padding."""

    parameter: CheckpointParameter
    offset: int
    num_rows: int

    def value(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the received values, a view. Padding is zero, as after vLLM's own loader."""
        parameter = self.parameter
        elements = memory.view(parameter.dtype)[self.offset // parameter.dtype.itemsize :]
        value = elements.as_strided(parameter.shape, parameter.strides, elements.storage_offset())
        value[self.num_rows :] = 0
        return value


def with_gaps(
    copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]],
    is_spread: Callable[[CheckpointParameter], bool],
) -> dict[CheckpointParameter, Sequence[LoaderCopy]]:
    """Return the same copies with a gap after every row of the matrices that `is_spread` names.

    oneDNN reads down the columns of a matrix that it packs. Rows of a power of two of bytes would
    all map to the same few lines of the cache: 2,048 columns of bfloat16 take 0.36 s per GB on two
    cores, with gaps 0.13; float32 0.08 and 0.06."""
    return dict(
        _with_gaps(parameter, own_copies)
        if len(parameter.shape) == 2
        and parameter.strides == (parameter.shape[1], 1)
        and all(copy.height == 1 or copy.pitch % parameter.shape[1] == 0 for copy in own_copies)
        and is_spread(parameter)
        else (parameter, own_copies)
        for parameter, own_copies in copies.items()
    )


def _with_gaps(
    parameter: CheckpointParameter, copies: Sequence[LoaderCopy]
) -> tuple[CheckpointParameter, Sequence[LoaderCopy]]:
    width = parameter.shape[1]
    stride = width + GAP_BYTES // parameter.dtype.itemsize

    def moved(elements: int) -> int:
        return elements // width * stride + elements % width

    return replace(parameter, strides=(stride, 1)), [
        replace(copy, offset=moved(copy.offset), pitch=moved(copy.pitch)) for copy in copies
    ]


def lay_out(
    copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]], *, in_place: bool = False
) -> tuple[list[PlacedParameter], SlotTable]:
    """Place all parameters side by side.

    Args:
        copies: by parameter, the rectangles that its loader copies.
        in_place: the engine computes with the received weights until the next push has arrived, so
            there are two buffers."""
    placements, end = [], 0
    for parameter, own_copies in copies.items():
        placements.append(PlacedParameter(parameter, end, _num_rows(parameter, own_copies)))
        end += -(-parameter.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    slots = [
        _slot_of_copy(placement, copy)
        for placement in placements
        for copy in copies[placement.parameter]
    ]
    return placements, SlotTable(end, slots, num_buffers=2 if in_place else 1)


def _num_rows(parameter: CheckpointParameter, copies: Sequence[LoaderCopy]) -> int:
    if len(parameter.shape) != 2:
        return parameter.shape[0]
    return max(copy.offset // parameter.strides[0] + copy.height for copy in copies)


def _slot_of_copy(placement: PlacedParameter, copy: LoaderCopy) -> Slot:
    size = placement.parameter.dtype.itemsize
    dtype = str(placement.parameter.dtype).removeprefix("torch.")
    offset, pitch = placement.offset + copy.offset * size, copy.pitch * size
    top, bottom, left, right = copy.rectangle
    return Slot(
        name=copy.name,
        top=top,
        bottom=bottom,
        left=left,
        right=right,
        offset=offset,
        pitch=pitch,
        dtype=dtype,
    )
