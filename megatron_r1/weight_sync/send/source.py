"""What a trainer rank sends: slices of its parameters as they are, or as FP8 blocks made on the
way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored.fp8_blocks import quantise

Form = Literal["plain", "codes", "scales"]


@dataclass(eq=False)
class Source:
    """`region` of an HF tensor, as it lies in a parameter that holds `piece` of it."""

    parameter: Tensor
    piece: Piece
    region: Region
    _view: Tensor | None = field(default=None, init=False, repr=False)
    _address: int = field(default=0, init=False, repr=False)
    """Of the parameter's memory when the view was made; kept by the view, it is nobody else's."""

    @property
    def is_here(self) -> bool:
        piece, region = self.piece, self.region
        start, end = (region.top, region.bottom) if piece.dim == 0 else (region.left, region.right)
        return piece.hf_start <= start and end <= piece.hf_start + piece.length

    def values(self) -> Tensor:
        """(height, width); a view, the same one as long as the parameter's memory is the same."""
        if self._view is None or self._address != self.parameter.data_ptr():
            self._view, self._address = self._look(), self.parameter.data_ptr()
        return self._view

    def _look(self) -> Tensor:
        matrix = self.parameter.detach()
        matrix = matrix if matrix.dim() > 1 else matrix[:, None]
        region, piece = self.region, self.piece
        move = piece.local_start - piece.hf_start
        down, right = (move, 0) if piece.dim == 0 else (0, move)
        rows = slice(region.top + down, region.bottom + down)
        return matrix[rows, region.left + right : region.right + right]


class Outgoing(Sequence[Tensor]):
    """The values of (source, form) pairs, made when they are asked for, for one push.

    "codes" and "scales" are what `stored.fp8_blocks.quantise` makes of a source of whole blocks:
    float8 of its shape, and fp32 for every 128 x 128 of them. Both come from one computation; kept
    are the codes that were asked for last, and the scales until they are.
    """

    def __init__(self, sources: Sequence[tuple[Source, Form]]):
        self._sources = sources
        self._last: tuple[int, Tensor] | None = None
        self._scales: dict[Source, Tensor] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Tensor:
        source, form = self._sources[index]
        if form == "plain":
            return source.values()
        if form == "scales":
            scales = self._scales.pop(source, None)
            values = quantise(source.values())[1] if scales is None else scales
        elif self._last and self._last[0] == index:  # its next rows
            return self._last[1]
        else:
            self._last = None  # freed before the next is made
            values, self._scales[source] = quantise(source.values())
        self._last = (index, values)
        return values
