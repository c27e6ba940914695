"""How the ranks of an engine and of the trainer agree, once per engine: tables for plans.

Over a torch.distributed store that the trainer hosts. Keys carry the engine's name, which is new
for every start of an engine.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import xxhash
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from megatron_r1.weight_sync.receive.table import Delivery, Table

GONE = "gone"
SAY_SECONDS = 10.0
LOOK_SECONDS = 1.0
"""How often a trainer rank that waits for an engine asks whether it is gone."""


class Offer(NamedTuple):
    """An engine rank: what it wants, and the transport's word on where."""

    table: Table
    address: str = ""


class _Told(msgspec.Struct, frozen=True):
    """An offer in the store, or why there is none."""

    digest: str = ""
    address: str = ""
    problem: str = ""


class Plan(msgspec.Struct, frozen=True):
    """A trainer rank to one engine rank: what it will bring with every push, and the transport's
    word on where from."""

    deliveries: list[Delivery]
    address: str = ""


class Tables:
    """What engine ranks want, by digest: all engines that are alike want the same, so each table is
    published once, and a trainer rank fetches it once."""

    def __init__(self, store: Store):
        self._store = PrefixStore("tables", store)
        self._known: dict[str, Table] = {}

    def publish(self, table: Table) -> str:
        """Returns its digest."""
        encoded = msgspec.msgpack.encode(table)
        digest = xxhash.xxh3_128_hexdigest(encoded)
        if not self._store.check([digest]):
            self._store.set(digest, encoded)
        return digest

    def get(self, digest: str) -> Table:
        """The same object every time."""
        if digest not in self._known:
            self._known[digest] = msgspec.msgpack.decode(self._store.get(digest), type=Table)
        return self._known[digest]


class Rendezvous:
    """Of one engine. Every call waits for the other side at most `timeout_seconds`, within a push
    `push_seconds`, and then raises torch.distributed.DistStoreError."""

    def __init__(
        self,
        store: Store,
        engine: str,
        timeout_seconds: float,
        push_seconds: float | None = None,
        tables: Tables | None = None,
    ):
        """push_seconds: default `timeout_seconds`. tables: of a process that meets many engines."""
        self.engine, self.timeout_seconds = engine, timeout_seconds
        self.push_seconds = timeout_seconds if push_seconds is None else push_seconds
        self.store = PrefixStore(engine, store)
        self.store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
        self._tables = tables or Tables(store)

    def offer(self, rank: int, offer: Offer) -> None:
        """Engine rank: publish it."""
        self._tell(rank, _Told(self._tables.publish(offer.table), offer.address))

    def withdraw(self, rank: int, problem: str) -> None:
        """Engine rank: there will be no offer, so that nobody waits for it."""
        self._tell(rank, _Told(problem=problem))

    def _tell(self, rank: int, told: _Told) -> None:
        self.store.set(f"offer/{rank}", msgspec.msgpack.encode(told))

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
            told = msgspec.msgpack.decode(self.store.get(f"offer/{rank}"), type=_Told)
            if told.problem:
                raise ValueError(f"engine rank {rank}: {told.problem}")
            found.append(Offer(self._tables.get(told.digest), told.address))
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
        """Trainer rank: wait for that. Raises ConnectionError for an engine said to be gone."""
        key = f"released/{rank}/{push}/{window}"
        deadline = time.monotonic() + self.push_seconds
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                self.store.wait([key], datetime.timedelta(seconds=min(left, LOOK_SECONDS)))
                return
            except DistStoreError:
                if self.store.check([GONE]):
                    raise ConnectionError(f"{self.engine} is gone") from None
                if left <= LOOK_SECONDS:
                    raise


def say_gone(host: str, port: int, engine: str) -> None:
    """Whoever knows it: a trainer whose store this is need not wait for the engine any more. Raises
    torch.distributed.DistError where the trainer is gone, too."""
    patience = datetime.timedelta(seconds=SAY_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=patience)
    PrefixStore(engine, store).set(GONE, "1")
