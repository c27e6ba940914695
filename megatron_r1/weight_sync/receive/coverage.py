"""Whether what is announced is what is wanted: every element once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_r1.weight_sync.receive.table import Delivery, Table


def check_coverage(table: Table, deliveries: Iterable[Delivery]) -> None:
    """Raises ValueError, naming tensors, where the deliveries leave elements of a slot out or bring
    some twice."""
    parts = defaultdict(list)
    for delivery in deliveries:
        parts[delivery.slot].append(delivery)
    problems = []
    for index, slot in enumerate(table.slots):
        brought = parts.get(index, [])
        size = sum(part.size for part in brought)
        if size != slot.height * slot.width or _overlap(brought):
            problems.append(f"{slot.name} ({size} of {slot.height * slot.width} elements)")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors would not be brought whole and once: {first_few(problems)}"
        )


def first_few(tensors: Sequence[str], count: int = 5) -> str:
    """For an error message about any number of them."""
    return ", ".join(tensors[:count]) + (", ..." if len(tensors) > count else "")


def _overlap(parts: list[Delivery]) -> bool:
    return any(
        max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(a.right, b.right)
        for i, a in enumerate(parts)
        for b in parts[:i]
    )
