"""The plan of a position, as the trainer publishes it for the engine ranks there: which deliveries
enter whom, and over NCCL each rank's sends and receives of every round."""

from typing import NamedTuple

import msgspec

from megatron_r1.push.table import Delivery, SlotTable


class ReceiverInfo(NamedTuple):
    """An engine rank's table, and the address at which its transport receives."""

    table: SlotTable
    address: str = ""


class Relay(NamedTuple):
    """Another engine of the set as the source of deliveries: its rank at the same position got them
    from trainer ranks and relays them."""

    member: int

    def __str__(self) -> str:
        return f"- (through engine {self.member} of the set)"


PositionPlan = list[list[tuple[int, list[Delivery]]]]
"""plan[member]: the pairs (sender, deliveries) that enter that engine's rank at one position."""


class RankCall(msgspec.Struct, frozen=True, array_like=True):
    """A send or a receive of a round: bucket `number` of the `count` of a payload.

    Attributes:
        peer: rank in the communicator.
        payload: the trainer rank that sends it, or -1 - member where a member of the set relays
            it."""

    peer: int
    payload: int
    number: int
    count: int


class RankRounds(msgspec.Struct, frozen=True):
    """The part of an engine rank in a push over NCCL: (send, receive) of each of its rounds, at
    first those in which weights enter it, then those in which they are relayed.

    Attributes:
        rank: the rank in the set's communicator.
        num_ranks: the number of that communicator's ranks.
        names: the ranks of its position that are in it, each "member/rank".
        entering: the rounds in which weights enter this rank.
        relayed: the rounds in which they are relayed."""

    rank: int
    num_ranks: int
    names: list[str]
    entering: list[tuple[RankCall | None, RankCall | None]]
    relayed: list[tuple[RankCall | None, RankCall | None]]


class PublishedPlan(msgspec.Struct, frozen=True):
    """What the ranks at a position do in a push.

    Attributes:
        entering: the deliveries from trainer ranks.
        rounds: over NCCL, the rounds by member; None for a rank for which the trainer rank on its
            GPU receives."""

    entering: PositionPlan
    rounds: list[RankRounds | None] | None = None


def deliveries_to(plan: PositionPlan, own: int) -> dict[int | Relay, list[Delivery]]:
    """Return the deliveries to one member of a position: those that enter it, by sender, then those
    that others relay to it."""
    deliveries: dict[int | Relay, list[Delivery]] = dict(plan[own])
    for member, senders in enumerate(plan):
        entered = [delivery for _, sent in senders for delivery in sent]
        if member != own and entered:
            # By slot: all members list what enters one in the same order.
            deliveries[Relay(member)] = sorted(entered, key=lambda delivery: delivery.slot)
    return deliveries
