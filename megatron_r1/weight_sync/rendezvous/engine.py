"""What an engine rank does at a rendezvous."""

import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from megatron_r1.weight_sync.rendezvous.base import ANSWER_SECONDS, Rendezvous
from megatron_r1.weight_sync.rendezvous.failure import Failure, decode_failure
from megatron_r1.weight_sync.rendezvous.offers import (
    PositionPlan,
    PublishedReceiver,
    ReceiverInfo,
)
from megatron_r1.weight_sync.table import Delivery


class Peer(NamedTuple):
    """Another engine of the set, as the source of deliveries: its rank at the same position has
    them from trainer ranks, and passes them on."""

    member: int

    def __str__(self) -> str:
        return f"- (through engine {self.member} of the set)"


class EngineRendezvous(Rendezvous):
    """The rendezvous as each rank of the engine has it."""

    _num_ranks = 0
    """Engine ranks of the whole set; known once the plan has been read."""

    def publish_receiver(self, rank: int, info: ReceiverInfo) -> None:
        """Publish the table and the address of engine rank `rank`."""
        digest = self._tables.publish(info.table)
        self._publish_offer(rank, PublishedReceiver(digest, info.address))

    def publish_problem(self, rank: int, problem: str) -> None:
        """Publish that this rank cannot take part, so that no other rank need wait for it."""
        self._publish_offer(rank, PublishedReceiver(problem=problem))
        self.report_own(rank, problem)

    def read_plan(self, rank: int) -> dict[int | Peer, list[Delivery]]:
        """Return the deliveries that trainer ranks send to this rank, by sender, then those that
        the other engines pass on to it."""
        self._num_ranks = self.await_prepared()
        plan = msgspec.msgpack.decode(self.shared.get(f"plan/{rank}"), type=PositionPlan)
        deliveries: dict[int | Peer, list[Delivery]] = dict(plan[self.member])
        for member, senders in enumerate(plan):
            entered = [delivery for _, sent in senders for delivery in sent]
            if member != self.member and entered:
                # By slot: all members list a share in the same order.
                deliveries[Peer(member)] = sorted(entered, key=lambda delivery: delivery.slot)
        return deliveries

    def publish_complete(self, push: int) -> None:
        """Publish that this rank, of a set of several engines, has all of a push."""
        if self.shared.add(f"has/{push}", 1) == self._num_ranks:
            self.shared.set(f"complete/{push}", "1")
            self.shared.delete_key(f"has/{push}")
            # The previous push's key only: trainer rank 0 may not have read this one's yet.
            self.shared.delete_key(f"complete/{push - 1}")

    def report_own(self, rank: int, error: str, *, is_damaged: bool = False) -> Failure:
        """Report a failure of this rank, as `report` does."""
        error = f"engine {self.member} of the set, rank {rank}: {error}"
        return self.report(Failure(error, [self.member], is_damaged))

    def find_cause(self, rank: int, error: str, is_closing: Callable[[], bool]) -> Failure:
        """Return why the exchange of this rank broke: the failure that the rank at fault has
        published, or else the death of the ranks at this position that do not answer.

        is_closing: ends the wait for answers when it returns True."""
        answers = f"answer/{rank}"
        self.shared.append(answers, f"{self.member} ")  # type: ignore[attr-defined]
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and not is_closing():
            if self.shared.check(["failed"]):
                return decode_failure(self.shared.get("failed"))
            if len(self.shared.get(answers).split()) == self.num_members:
                break
            time.sleep(0.1)
        answered = {int(member) for member in self.shared.get(answers).split()}
        silent = sorted(set(range(self.num_members)) - answered)
        if silent:
            names = ", ".join(map(str, silent))
            error = f"rank {rank} of engine {names} of the set has died or hangs: {error}"
        return self.report(Failure(error, silent))

    def _publish_offer(self, rank: int, published: PublishedReceiver) -> None:
        self.store.set(f"offer/{rank}", msgspec.msgpack.encode(published))  # type: ignore[arg-type]
