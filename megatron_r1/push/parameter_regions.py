"""The regions of this rank's parameters that a push sends, as they are or quantized to FP8."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from megatron_r1.models.weights.formats.quantized_blocks import quantize_fp8
from megatron_r1.models.weights.loading import merge_adapter
from megatron_r1.models.weights.splits import Piece
from megatron_r1.push.matching.regions import Region

Encoding = Literal["plain", "codes", "scales"]
"""The form of a chunk: its values, or the FP8 codes or scales of its blocks."""


class ParameterRegion(NamedTuple):
    """A region of an HF tensor inside a parameter of this rank.

    Attributes:
        parameter: the Megatron parameter.
        piece: what the parameter holds of the HF tensor.
        region: rows and columns of the HF tensor."""

    parameter: Tensor
    piece: Piece
    region: Region

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
        """Return the values (height, width): a view, or those of a weight with its adapter."""
        region, piece = self.region, self.piece
        move = piece.local_start - piece.hf_start
        row_move, column_move = (move, 0) if piece.dim == 0 else (0, move)
        rows = slice(region.top + row_move, region.bottom + row_move)
        columns = slice(region.left + column_move, region.right + column_move)
        if self.is_merged:
            return merge_adapter(self.parameter, rows, columns)
        matrix = self.parameter.detach()
        return (matrix if matrix.dim() > 1 else matrix[:, None])[rows, columns]


class EncodedRegions:
    """The tensors of one push to one engine rank, computed when they are read.

    "codes" and "scales" are the two results of `quantized_blocks.quantize_fp8` for whole blocks:
    float8 of their shape, and one fp32 per 128 x 128 block. One computation gives both. To take
    little memory, only the codes or merged values that were read last are kept, and scales until
    they are read.

    Args:
        regions: each chunk's values and their form.
        power_of_two: whether scales are rounded up to powers of two."""

    def __init__(
        self, regions: Iterable[tuple[ParameterRegion, Encoding]], *, power_of_two: bool = False
    ):
        self._regions = list(regions)
        self._quantize = partial(quantize_fp8, power_of_two=power_of_two)
        self._last: tuple[int, Tensor] | None = None
        self._scales: dict[int, Tensor] = {}
        """By the identity of a region, which its codes and scales share."""

    def __getitem__(self, index: int) -> Tensor:
        """Return the values (height, width) of one chunk, in the trainer's dtype if plain."""
        source, encoding = self._regions[index]
        if encoding == "plain" and not source.is_merged:
            return source.values()
        if self._last and self._last[0] == index:  # the next rows of the same chunk
            return self._last[1]
        if encoding == "scales":
            scales = self._scales.pop(id(source), None)
            values = self._quantize(source.values())[1] if scales is None else scales
        else:
            self._last = None  # frees the last values before the next are computed
            values = source.values()
            if encoding == "codes":
                values, self._scales[id(source)] = self._quantize(values)
        self._last = (index, values)
        return values
