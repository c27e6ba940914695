"""Rectangles of HF tensors, and the blocks of FP8 in them.

FP8 pushes: a block of 128 x 128 has one scale, so a rank that holds all of a block quantizes it and
sends it whole to an engine rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.models.weights.formats.published_layout import FP8_BLOCK_SIZE
from megatron_r1.models.weights.splits import Piece, Shape


@dataclass(frozen=True, order=True)
class Region:
    """Rows [top, bottom) and columns [left, right) of one HF tensor; a vector is one column.

    Attributes:
        top: the first row.
        bottom: the row after the last one.
        left: the first column.
        right: the column after the last one."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def full(cls, shape: Shape) -> Region:
        """Return the region of a whole tensor; a vector is one column."""
        return cls(0, shape[0], 0, shape[1] if len(shape) > 1 else 1)

    @classmethod
    def narrow(cls, shape: Shape, dim: int, start: int, length: int) -> Region:
        """Return all of a tensor that lies within a range of its rows or of its columns.

        Args:
            shape: the tensor's, of one or two dimensions.
            dim: 0 for rows, 1 for columns.
            start: the first row or column.
            length: the number of rows or columns."""
        full_region = cls.full(shape)
        if dim == 0:
            return cls(start, start + length, full_region.left, full_region.right)
        return cls(full_region.top, full_region.bottom, start, start + length)

    @classmethod
    def from_piece(cls, piece: Piece, shape: Shape) -> Region:
        """Return the region that `piece` covers of its HF tensor, which has `shape`."""
        return cls.narrow(shape, piece.dim, piece.hf_start, piece.length)

    def intersection(self, region: Region) -> Region | None:
        """Return the region that both cover, or None."""
        top, bottom = max(self.top, region.top), min(self.bottom, region.bottom)
        left, right = max(self.left, region.left), min(self.right, region.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def num_elements(self) -> int:
        """Elements of the region, rows times columns."""
        return (self.bottom - self.top) * (self.right - self.left)


def scale_region(region: Region) -> Region:
    """Return the region of the tensor of scales that belongs to these whole blocks."""
    return Region(
        region.top // FP8_BLOCK_SIZE, -(-region.bottom // FP8_BLOCK_SIZE),
        region.left // FP8_BLOCK_SIZE, -(-region.right // FP8_BLOCK_SIZE),
    )  # fmt: skip


def first_unaligned_edge(region: Region, shape: Shape) -> int | None:
    """Return the first row or column at which `region` cuts a block of a tensor of `shape`."""
    edges = ((region.top, 0), (region.bottom, 0), (region.left, 1), (region.right, 1))
    return next((edge for edge, dim in edges if edge % FP8_BLOCK_SIZE and edge != shape[dim]), None)
