"""Rectangles of tensors, and their transfers from a trainer rank to an engine rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.weights.rules import Piece, Shape


@dataclass(frozen=True, order=True)
class Region:
    """Rows [top, bottom) and columns [left, right) of one HF tensor; a vector is one column."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        return cls(0, shape[0], 0, shape[1] if len(shape) > 1 else 1)

    @classmethod
    def along(cls, shape: Shape, dim: int, start: int, length: int) -> Region:
        """Return `length` rows (dim 0) or columns (dim 1) from `start` of a tensor of `shape`."""
        whole = cls.whole(shape)
        if dim == 0:
            return cls(start, start + length, whole.left, whole.right)
        return cls(whole.top, whole.bottom, start, start + length)

    @classmethod
    def of(cls, piece: Piece, shape: Shape) -> Region:
        """Return the region that `piece` covers of its HF tensor, which has `shape`."""
        return cls.along(shape, piece.dim, piece.hf_start, piece.length)

    def intersection(self, other: Region) -> Region | None:
        """Return the region that both cover, or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def num_elements(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Transfer:
    """`region` of the HF tensor `name`, which has `shape`.

    sender: global trainer rank; receiver: global engine rank. dtype: the tensor's own, or None for
    the push's.
    """

    name: str
    shape: Shape
    region: Region
    sender: int
    receiver: int
    dtype: str | None
