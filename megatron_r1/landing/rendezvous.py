"""How the ranks of an engine and of the trainer agree, once per engine: tables for plans.

Over a torch.distributed store that the trainer hosts. Keys carry the engine's name, which is new
for every start of an engine.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import msgspec
from torch.distributed import PrefixStore, Store

from megatron_r1.landing.table import Delivery, Table


class Offer(msgspec.Struct, frozen=True):
    """An engine rank: what it wants, and the transport's word on where; or why there is none."""

    table: Table
    address: str = ""
    problem: str = ""


class Plan(msgspec.Struct, frozen=True):
    """A trainer rank to one engine rank: what it will bring with every push, and the transport's
    word on where from."""

    deliveries: list[Delivery]
    address: str = ""


class Rendezvous:
    """Of one engine. Every call waits for the other side at most `timeout_seconds`, within a push
    `push_seconds`, and then raises torch.distributed.DistStoreError."""

    def __init__(
        self,
        store: Store,
        engine: str,
        timeout_seconds: float,
        push_seconds: float | None = None,
    ):
        """push_seconds: default `timeout_seconds`."""
        self.engine, self.timeout_seconds = engine, timeout_seconds
        self.push_seconds = timeout_seconds if push_seconds is None else push_seconds
        self.store = PrefixStore(engine, store)
        self.store.set_timeout(datetime.timedelta(seconds=timeout_seconds))

    def offer(self, rank: int, offer: Offer) -> None:
        """Engine rank: publish it."""
        self.store.set(f"offer/{rank}", msgspec.msgpack.encode(offer))

    def withdraw(self, rank: int, problem: str) -> None:
        """Engine rank: there will be no offer, so that nobody waits for it."""
        self.offer(rank, Offer(Table(0, []), problem=problem))

    def plans(self, rank: int) -> dict[int, Plan]:
        """Engine rank: the plan of every trainer rank that brings it something."""
        self.store.wait(["planned"])
        senders = self.store.get(f"senders/{rank}").decode().split()
        return {
            int(sender): msgspec.msgpack.decode(self.store.get(f"plan/{rank}/{sender}"), type=Plan)
            for sender in senders
        }

    def offers(self, num_ranks: int) -> list[Offer]:
        """Trainer rank: those of all ranks of the engine. Raises ValueError where one has none."""
        found = []
        for rank in range(num_ranks):
            offer = msgspec.msgpack.decode(self.store.get(f"offer/{rank}"), type=Offer)
            if offer.problem:
                raise ValueError(f"engine rank {rank}: {offer.problem}")
            found.append(offer)
        return found

    def plan(self, sender: int, num_senders: int, plans: Mapping[int, Plan], ranks: int) -> None:
        """Trainer rank `sender` of `num_senders`: publish its plans by engine rank."""
        for rank, plan in plans.items():
            self.store.set(f"plan/{rank}/{sender}", msgspec.msgpack.encode(plan))
            self.store.append(f"senders/{rank}", f"{sender} ")
        if self.store.add("count", 1) == num_senders:
            for rank in range(ranks):
                self.store.append(f"senders/{rank}", "")
            self.store.set("planned", "1")

    def release(self, rank: int, push: int, window: int) -> None:
        """Engine rank: what landed of `window` is in use, its memory may be written again."""
        self.store.set(f"released/{rank}/{push}/{window}", "1")
        if push > 1:
            self.store.delete_key(f"released/{rank}/{push - 1}/{window}")

    def await_release(self, rank: int, push: int, window: int) -> None:
        """Trainer rank: wait for that."""
        key = f"released/{rank}/{push}/{window}"
        self.store.wait([key], datetime.timedelta(seconds=self.push_seconds))
