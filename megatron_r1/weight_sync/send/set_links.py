"""A trainer rank's links to the engine ranks of a set, which receive a push together."""

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_r1.weight_sync.plan.receiver_layout import Encoding
from megatron_r1.weight_sync.receive.rendezvous import Rendezvous
from megatron_r1.weight_sync.send.slices import ParameterSlice
from megatron_r1.weight_sync.transports.base import Sender


class Link(NamedTuple):
    """The link to a rank of engine number `engine` of the set: the transport's end, and the data of
    each of its deliveries."""

    engine: int
    end: Sender
    slices: list[tuple[ParameterSlice, Encoding]]


@dataclass
class SetLinks:
    """The links of this rank to a set of engines.

    rendezvous: of each engine with the trainer. sent: each trainer rank's load by a push
    to the set (`plan.entry.sender_loads`)."""

    rendezvous: list[Rendezvous]
    sent: list[float]
    links: list[Link] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """The bytes that this rank sends to the set per push."""
        ends = [link.end for link in self.links]
        return sum(part.num_bytes(end.table) for end in ends for part in end.deliveries)

    def close(self) -> None:
        for link in self.links:
            link.end.close()
