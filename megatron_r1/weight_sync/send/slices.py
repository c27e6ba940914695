"""Slices of a trainer rank's parameters, as they are, or merged with an adapter or quantized to FP8
blocks during a push."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_r1.weight_sync.plan.receiver_layout import Encoding
from megatron_r1.weight_sync.plan.tensors import Region
from megatron_r1.weights.local import merged
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored.fp8_blocks import quantize


@dataclass(eq=False)
class ParameterSlice:
    """The `region` of an HF tensor inside a parameter that holds `piece` of that tensor."""

    parameter: Tensor
    piece: Piece
    region: Region
    _view: Tensor | None = field(default=None, init=False, repr=False)
    _address: int = field(default=0, init=False, repr=False)
    """Address of the parameter's memory when `_view` was made, which keeps that memory in use."""

    @property
    def is_held(self) -> bool:
        """Whether the piece covers the region."""
        piece, region = self.piece, self.region
        start, end = (region.top, region.bottom) if piece.dim == 0 else (region.left, region.right)
        return piece.hf_start <= start and end <= piece.hf_start + piece.length

    @property
    def is_merged(self) -> bool:
        """Whether the values are those of a weight with an adapter, computed when they are read."""
        return hasattr(self.parameter, "adapter")

    def values(self) -> Tensor:
        """Return the values (height, width): a view, the same one while the parameter's memory is
        the same, or the merged values."""
        if self.is_merged:
            return merged(self.parameter, *self._local_slices())
        if self._view is None or self._address != self.parameter.data_ptr():
            matrix = self.parameter.detach()
            matrix = matrix if matrix.dim() > 1 else matrix[:, None]
            self._view = matrix[self._local_slices()]
            self._address = self.parameter.data_ptr()
        return self._view

    def _local_slices(self) -> tuple[slice, slice]:
        """Return the region's rows and columns in the parameter."""
        region, piece = self.region, self.piece
        move = piece.local_start - piece.hf_start
        down, right = (move, 0) if piece.dim == 0 else (0, move)
        rows = slice(region.top + down, region.bottom + down)
        return rows, slice(region.left + right, region.right + right)


class EncodedSlices:
    """The tensors of one push to one engine rank, computed when they are read.

    "codes" and "scales" are the two results of `stored.fp8_blocks.quantize` for a slice of whole
    blocks: float8 of its shape, and one fp32 per 128 x 128 block. One computation gives both. To
    take little memory, only the codes or merged values that were read last are kept, and scales
    until they are read."""

    def __init__(self, slices: Iterable[tuple[ParameterSlice, Encoding]]):
        self._slices = list(slices)
        self._last: tuple[int, Tensor] | None = None
        self._scales: dict[ParameterSlice, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        """Return the values (height, width) of one delivery, in the trainer's dtype if plain."""
        source, encoding = self._slices[index]
        if encoding == "plain" and not source.is_merged:
            return source.values()
        if encoding == "scales":
            scales = self._scales.pop(source, None)
            values = quantize(source.values())[1] if scales is None else scales
        elif self._last and self._last[0] == index:  # the next rows of the same delivery
            return self._last[1]
        else:
            self._last = None  # frees the last values before the next are computed
            if encoding == "plain":
                values = source.values()
            else:
                values, self._scales[source] = quantize(source.values())
        self._last = (index, values)
        return values
