"""A rectangle of a tensor: what a piece on one side and a slice on the other have in common."""

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
        """`length` rows (dim 0) or columns (dim 1) from `start` on of a tensor of `shape`."""
        whole = cls.whole(shape)
        if dim == 0:
            return cls(start, start + length, whole.left, whole.right)
        return cls(whole.top, whole.bottom, start, start + length)

    @classmethod
    def of(cls, piece: Piece, shape: Shape) -> Region:
        """Where `piece` lies in its HF tensor, which has `shape`."""
        return cls.along(shape, piece.dim, piece.hf_start, piece.length)

    def meet(self, other: Region) -> Region | None:
        """What both cover; None for nothing."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def size(self) -> int:
        """Elements."""
        return (self.bottom - self.top) * (self.right - self.left)
