"""What engine ranks offer to receive, and the plan that trainer ranks answer with."""

from typing import NamedTuple

import msgspec

from megatron_r1.weight_sync.table import Delivery, SlotTable

PositionPlan = list[list[tuple[int, list[Delivery]]]]
"""plan[member]: the pairs (sender, deliveries) that enter that engine's rank at one position."""


class ReceiverInfo(NamedTuple):
    """An engine rank's table, and the address at which its transport receives."""

    table: SlotTable
    address: str = ""


class PublishedReceiver(msgspec.Struct, frozen=True):
    """A `ReceiverInfo` as it is in the store, with the table's digest instead of the table; or the
    problem because of which the rank cannot receive."""

    digest: str = ""
    address: str = ""
    problem: str = ""
