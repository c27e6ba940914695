"""The place of each parameter in the receive buffer, and the table of places for the trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from megatron_r1.vllm_plugin.recorder import CheckpointParameter, LoaderCopy
from megatron_r1.weight_sync.table import Slot, SlotTable

ALIGNMENT = 64
"""Bytes; parameters begin at multiples of these: they are views of the memory while their layers
load."""
GAP_BYTES = 128
"""The gap between the rows of a matrix that `with_gaps` spreads."""


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter in checkpoint form at byte `offset` of the memory, while it holds `window`.

    num_rows: the rows that are received; all others are a vocabulary's padding."""

    parameter: CheckpointParameter
    offset: int
    window: int
    num_rows: int

    def value(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the received values, a view. Padding is zero, as after vLLM's own loader."""
        at = self.parameter
        elements = memory.view(at.dtype)[self.offset // at.dtype.itemsize :]
        value = elements.as_strided(at.shape, at.strides, elements.storage_offset())
        value[self.num_rows :] = 0
        return value


def with_gaps(
    copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]],
    is_spread: Callable[[CheckpointParameter], bool],
) -> dict[CheckpointParameter, Sequence[LoaderCopy]]:
    """Return the same copies with a gap after every row of the matrices that `is_spread` names.

    oneDNN reads down the columns of a matrix that it packs. Rows of a power of two of bytes would
    all map to the same few lines of the cache: 2,048 columns of bfloat16 take 0.36 s per GB on two
    cores, with gaps 0.13; float32 0.08 and 0.06 (docs/log.md)."""
    return dict(
        _with_gaps(parameter, of_parameter)
        if len(parameter.shape) == 2
        and parameter.strides == (parameter.shape[1], 1)
        and all(copy.height == 1 or copy.pitch % parameter.shape[1] == 0 for copy in of_parameter)
        and is_spread(parameter)
        else (parameter, of_parameter)
        for parameter, of_parameter in copies.items()
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
    copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]],
    limit_bytes: int | None = None,
    *,
    in_place: bool = False,
) -> tuple[list[PlacedParameter], SlotTable]:
    """Place all parameters side by side, or in windows where they do not fit into limit_bytes.

    Windows take turns in two halves of the memory, so that one is filled while the other is loaded;
    a layer's parameters are in one window. in_place: the engine computes with the received weights
    until the next push has arrived, so there are two areas if they fit.

    Raises ValueError where two layers do not fit into limit_bytes."""
    layers = [list(group) for _, group in groupby(copies, key=lambda p: id(p.layer))]
    sizes = [sum(_aligned(p.num_bytes) for p in layer) for layer in layers]
    total = sum(sizes)
    areas = 2 if in_place and (limit_bytes is None or 2 * total <= limit_bytes) else 1
    half = total
    if limit_bytes is not None and total > limit_bytes:
        half = limit_bytes // 2 // ALIGNMENT * ALIGNMENT
    if limit_bytes is not None and max(sizes) > half:
        raise ValueError(
            f"push.memory_gib: {limit_bytes / 2**30:.3g} GiB cannot hold two layers of "
            f"{max(sizes) / 2**30:.3g} GiB; raise it to {2 * max(sizes) / 2**30:.3g} or more"
        )
    placed, window, end = [], 0, 0
    for layer, size in zip(layers, sizes, strict=True):
        if end + size > half:
            window, end = window + 1, 0
        for parameter in layer:
            rows = _num_rows(parameter, copies[parameter])
            placed.append(PlacedParameter(parameter, window % 2 * half + end, window, rows))
            end += _aligned(parameter.num_bytes)
    slots = [_slot(at, copy) for at in placed for copy in copies[at.parameter]]
    return placed, SlotTable(total if half == total else 2 * half, slots, areas)


def _num_rows(parameter: CheckpointParameter, copies: Sequence[LoaderCopy]) -> int:
    if len(parameter.shape) != 2:
        return parameter.shape[0]
    return max(copy.offset // parameter.strides[0] + copy.height for copy in copies)


def _slot(at: PlacedParameter, copy: LoaderCopy) -> Slot:
    size = at.parameter.dtype.itemsize
    dtype = str(at.parameter.dtype).removeprefix("torch.")
    offset, pitch = at.offset + copy.offset * size, copy.pitch * size
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
        window=at.window,
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
