"""Checks that the announced deliveries cover a table: every element once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_r1.weight_sync.receive.table import Delivery, SlotTable


def check_coverage(table: SlotTable, deliveries: Iterable[Delivery]) -> None:
    """Raise ValueError, naming tensors, where the deliveries leave out elements of a slot or hold
    some twice."""
    parts = defaultdict(list)
    for delivery in deliveries:
        parts[delivery.slot].append(delivery)
    problems = []
    for index, slot in enumerate(table.slots):
        of_slot = parts.get(index, [])
        size = sum(part.num_elements for part in of_slot)
        if size != slot.height * slot.width or _overlap(of_slot):
            problems.append(f"{slot.name} ({size} of {slot.height * slot.width} elements)")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors would not be sent whole and once: {first_few(problems)}"
        )


def first_few(tensors: Sequence[str], count: int = 5) -> str:
    """Return the first names, for an error message about any number of them."""
    return ", ".join(tensors[:count]) + (", ..." if len(tensors) > count else "")


def _overlap(parts: list[Delivery]) -> bool:
    return any(
        max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(a.right, b.right)
        for i, a in enumerate(parts)
        for b in parts[:i]
    )
