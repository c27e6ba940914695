"""What the trainer and the engines publish to each other in the store, before the first push.

Each engine rank publishes a `slots.SlotTable` of the tensors that it needs, the trainer a
`PublishedPlan` of what each engine rank receives, over NCCL with its sends and receives of every
round."""

from typing import NamedTuple

import msgspec

from megatron_r1.push.slots import SlotTable, TensorChunk


class ReceiverInfo(NamedTuple):
    """What an engine rank publishes of its receiver.

    Attributes:
        table: the tensors that it needs.
        address: where its transport receives."""

    table: SlotTable
    address: str = ""


class RelaySource(NamedTuple):
    """Another engine of the set as the source of chunks: its equal rank got them from trainer ranks
    and relays them.

    Attributes:
        member: that engine, by its number in the set."""

    member: int

    def __str__(self) -> str:
        return f"- (through engine {self.member} of the set)"


EngineRankChunks = list[list[tuple[int, list[TensorChunk]]]]
"""plan[member]: the pairs (trainer rank, chunks) of what one rank of that engine gets from trainer
ranks."""


class PublishedTransfer(msgspec.Struct, frozen=True, array_like=True):
    """A send or a receive of a round: bucket `number` of the `count` of a payload.

    Attributes:
        peer: rank in the communicator.
        source: the trainer rank that sends it, or -1 - member where a member of the set relays
            it.
        number: the bucket of the payload, from 0.
        count: buckets of that payload.
    """

    peer: int
    source: int
    number: int
    count: int


class RankRounds(msgspec.Struct, frozen=True):
    """The part of an engine rank in a push over NCCL: (send, receive) of each of its rounds.

    Attributes:
        rank: the rank in the set's communicator.
        num_ranks: the size of that communicator.
        rank_ids: the equal ranks of all engines that are in it, each "member/engine rank".
        scatter: the rounds in which trainer ranks send.
        relay: the rounds in which engine ranks relay."""

    rank: int
    num_ranks: int
    rank_ids: list[str]
    scatter: list[tuple[PublishedTransfer | None, PublishedTransfer | None]]
    relay: list[tuple[PublishedTransfer | None, PublishedTransfer | None]]


class PublishedPlan(msgspec.Struct, frozen=True):
    """What equal ranks of a set's engines do in a push.

    Attributes:
        from_trainers: the chunks that each gets from trainer ranks.
        rounds: over NCCL, the rounds by member; None for a rank for which the trainer rank on its
            GPU receives."""

    from_trainers: EngineRankChunks
    rounds: list[RankRounds | None] | None = None


def chunks_to(plan: EngineRankChunks, member: int) -> dict[int | RelaySource, list[TensorChunk]]:
    """Return the chunks to one member's rank by source: from trainer ranks, then those that other
    members relay."""
    chunks: dict[int | RelaySource, list[TensorChunk]] = dict(plan[member])
    for relay, senders in enumerate(plan):
        relayed_chunks = [chunk for _, sent in senders for chunk in sent]
        if relay != member and relayed_chunks:
            # By slot: all members list what one relays in the same order.
            chunks[RelaySource(relay)] = sorted(relayed_chunks, key=lambda chunk: chunk.slot)
    return chunks
