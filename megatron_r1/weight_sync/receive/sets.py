"""How the ranks of several equal engines, a *set*, and those of the trainer agree, once per set.

One trainer rank reads the tables and passes them on to the others; the plan of a position is one
key, which the ranks at it read, one of each engine. So a rank makes a handful of requests to the
store, whatever the number of ranks. No run uses it yet, see docs/push.md.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec
from torch.distributed import PrefixStore, Store

from megatron_r1.weight_sync.receive.rendezvous import Rendezvous, SendPlan, TableStore, put
from megatron_r1.weight_sync.receive.table import Delivery

ANSWER_SECONDS = 5.0
"""For the ranks of a position to show, after a failure, that they are alive."""


class Peer(NamedTuple):
    """The source of what entered another engine of the set and is passed on by it."""

    engine: int

    def __str__(self) -> str:
        return f"- (through engine {self.engine} of the set)"


class PositionPlan(msgspec.Struct, frozen=True):
    """entries[engine]: (sender, deliveries) of what enters the engine's rank at this position.
    problem: why there is none."""

    entries: list[list[tuple[int, list[Delivery]]]] = []
    problem: str = ""


class MemberRendezvous(Rendezvous):
    """The meeting of engine `engine` of the set `name`, of `engines` engines, with the trainer and
    with the other engines. Arguments as of `Rendezvous`."""

    def __init__(
        self,
        store: Store,
        name: str,
        engine: int,
        engines: int,
        timeout_seconds: float,
        push_seconds: float | None = None,
        tables: TableStore | None = None,
    ):
        member = f"{name}.{engine}"
        super().__init__(store, member, timeout_seconds, push_seconds, tables)
        self.member, self.members = engine, engines
        self.shared = PrefixStore(name, store)

    def store_of_pair(self) -> Store:
        # A client of its own: all others would have to wait while one waits for an address.
        return self.store.clone()  # type: ignore[attr-defined]  # missing in the stubs

    def plans(self, rank: int) -> dict[int | Peer, SendPlan]:  # type: ignore[override]
        """Engine rank: return the plans of trainer ranks by sender, then of the other engines."""
        plan = msgspec.msgpack.decode(self.shared.get(f"plan/{rank}"), type=PositionPlan)
        if plan.problem:
            raise ValueError(plan.problem)
        found: dict[int | Peer, SendPlan] = {
            sender: SendPlan(deliveries) for sender, deliveries in plan.entries[self.member]
        }
        for engine, entries in enumerate(plan.entries):
            parts = [part for _, deliveries in entries for part in deliveries]
            if engine != self.member and parts:
                found[Peer(engine)] = SendPlan(parts)
        return found

    def report_failure(self, rank: int, error: str) -> str:
        """Engine rank: publish an error, unless another rank has, and return the first."""
        own = f"engine {self.member} of the set, rank {rank}: {error}"
        return self.shared.compare_set("failed", "", own).decode()

    def cause(self, rank: int, error: str) -> str:
        """Engine rank whose exchange broke: return the error of the rank that failed, which has
        published it, or else has died: then it does not answer."""
        mine = f"answer/{rank}"
        self.shared.append(mine, f"{self.member} ")  # type: ignore[attr-defined]
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if self.shared.check(["failed"]):
                return self.shared.get("failed").decode()
            if len(self.shared.get(mine).split()) == self.members:
                break
            time.sleep(0.1)
        answered = {int(engine) for engine in self.shared.get(mine).split()}
        silent = sorted(set(range(self.members)) - answered)
        if silent:
            names = ", ".join(map(str, silent))
            error = f"rank {rank} of engine {names} of the set has died or hangs: {error}"
        return self.report_failure(rank, error)


def publish_plan(store: Store, name: str, position: int, plan: PositionPlan) -> None:
    """Trainer rank: publish the plan of a position of the set `name`."""
    put(PrefixStore(name, store), f"plan/{position}", msgspec.msgpack.encode(plan))
