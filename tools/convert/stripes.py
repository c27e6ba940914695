"""How much of a tensor is in memory at once."""

from __future__ import annotations

from collections.abc import Iterator

STRIPE_ELEMENTS = 8 << 20
"""Elements in hand at a time: 32 MiB in fp32, of which a step holds a few copies."""


def stripes(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, rows) that cover a tensor from the top; firsts are multiples of `multiple`."""
    width = shape[1] if len(shape) > 1 else 1
    rows = max(multiple, STRIPE_ELEMENTS // max(1, width) // multiple * multiple)
    for first in range(0, shape[0], rows):
        yield first, min(rows, shape[0] - first)
