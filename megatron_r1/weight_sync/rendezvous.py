"""Agreement between the ranks of several equal engines, a *set*, and those of the trainer: on the
plan, once per set, and on a failure, during a push.

All sides use a torch.distributed store that the trainer hosts. Keys begin with the set's name,
which is new for every set. One trainer rank reads the engine ranks' tables and passes them on to
the others; the plan of a position is one key, which the ranks at it read, one of each engine. So a
rank makes a handful of requests to the store, whatever the number of ranks."""

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import xxhash
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from megatron_r1.weight_sync.table import Delivery, SlotTable

REPORT_SECONDS = 10.0
POLL_SECONDS = 1.0
"""The pause between checks of a rank that waits for memory whether the set has failed."""
KEY_POLL_SECONDS = 0.01
"""The pause between checks of trainer rank 0 whether all engines are there."""
ANSWER_SECONDS = 5.0
"""The time limit for the ranks of a position to show, after a failure, that they are alive."""
PositionPlan = list[list[tuple[int, list[Delivery]]]]
"""plan[engine]: (sender, deliveries) of what enters the engine's rank at one position."""


class ReceiverInfo(NamedTuple):
    """An engine rank's table, and the address at which its transport receives."""

    table: SlotTable
    address: str = ""


class _PublishedReceiver(msgspec.Struct, frozen=True):
    """A ReceiverInfo as it is in the store, or the problem because of which there is none."""

    digest: str = ""
    address: str = ""
    problem: str = ""


class Peer(NamedTuple):
    """The source of what entered another engine of the set and is passed on by it."""

    engine: int

    def __str__(self) -> str:
        return f"- (through engine {self.engine} of the set)"


class Failure(msgspec.Struct, frozen=True):
    """Why a set can push no more. members: the engines at fault, by their number in the set, as far
    as known. is_damaged: bytes arrived otherwise than they were sent."""

    error: str
    members: list[int] = []
    is_damaged: bool = False


class SetFailed(ConnectionError):
    """Another rank of the set, or the controller, has reported `failure`."""

    def __init__(self, failure: Failure):
        super().__init__(failure.error)
        self.failure = failure


class TableStore:
    """Publishes slot tables under their digest, so equal engines share one. Each is published once
    and read once: one per engine took 15 s for 64 engines (docs/log.md)."""

    def __init__(self, store: Store):
        self._store = PrefixStore("tables", store)
        self._known: dict[str, SlotTable] = {}

    def publish(self, table: SlotTable) -> str:
        """Write the table, if it is new, and return its digest."""
        encoded = msgspec.msgpack.encode(table)
        digest = xxhash.xxh3_128_hexdigest(encoded)
        if not self._store.check([digest]):
            self._store.set(digest, encoded)  # type: ignore[arg-type]  # the stubs say str
        return digest

    def get(self, digest: str) -> SlotTable:
        """Return the table, the same object every time."""
        if digest not in self._known:
            encoded = self._store.get(digest)
            self._known[digest] = msgspec.msgpack.decode(encoded, type=SlotTable)
        return self._known[digest]


class Rendezvous:
    """The meeting of engine number `member` of the set `name`, of `members` engines, with the
    trainer and with the other engines.

    Every call waits for the other side at most `timeout_seconds`, during a push `push_seconds`
    (default the same), and then raises torch.distributed.DistStoreError; it raises SetFailed as
    soon as the set is reported as failed. tables: shared by a process that meets many sets."""

    def __init__(
        self,
        store: Store,
        name: str,
        timeout_seconds: float,
        push_seconds: float | None = None,
        tables: TableStore | None = None,
        *,
        member: int = 0,
        members: int = 1,
    ):
        self.engine, self.timeout_seconds = f"{name}.{member}", timeout_seconds
        self.push_seconds = timeout_seconds if push_seconds is None else push_seconds
        self.member, self.members = member, members
        self.store, self.shared = PrefixStore(self.engine, store), PrefixStore(name, store)
        self.store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
        self._tables = tables or TableStore(store)
        self._num_ranks = 0
        self._waiting = threading.local()

    def new_connection(self) -> Store:
        """Return a new connection to the store, for a thread of its own: while one waits, all
        others of its connection have to wait."""
        return self.shared.clone()  # type: ignore[attr-defined]  # missing in the stubs

    def publish_receiver(self, rank: int, info: ReceiverInfo) -> None:
        """Engine rank: publish its table and address."""
        self._publish_offer(
            rank, _PublishedReceiver(self._tables.publish(info.table), info.address)
        )

    def publish_problem(self, rank: int, problem: str) -> None:
        """Engine rank: publish that it cannot take part, so that no other rank need wait."""
        self._publish_offer(rank, _PublishedReceiver(problem=problem))
        self.report(Failure(f"{self._rank_name(rank)}: {problem}", [self.member]))

    def _publish_offer(self, rank: int, published: _PublishedReceiver) -> None:
        self.store.set(f"offer/{rank}", msgspec.msgpack.encode(published))  # type: ignore[arg-type]

    def read_receivers(self, num_ranks: int) -> list[ReceiverInfo]:
        """Trainer rank: return all ranks of the engine. Raises ValueError for a rank's problem."""
        offers = [f"offer/{rank}" for rank in range(num_ranks)]
        self._wait_for_keys(self.store, offers, self.timeout_seconds)
        receivers = []
        for rank, offer in enumerate(offers):
            published = msgspec.msgpack.decode(self.store.get(offer), type=_PublishedReceiver)
            if published.problem:
                raise ValueError(f"engine rank {rank}: {published.problem}")
            table = self._tables.get(published.digest)
            receivers.append(ReceiverInfo(table, published.address))
        return receivers

    def publish_plan(self, position: int, plan: PositionPlan) -> None:
        """Trainer rank: publish the plan of a position."""
        self.shared.set(f"plan/{position}", msgspec.msgpack.encode(plan))  # type: ignore[arg-type]

    def publish_prepared(self, num_senders: int, num_ranks: int) -> None:
        """Trainer rank, one of `num_senders`: publish that its plans are there, and that it can be
        reached. num_ranks: of all engines of the set."""
        if self.shared.add("prepared", 1) == num_senders:
            self.shared.set("ready", str(num_ranks))

    def await_prepared(self) -> int:
        """Wait until all trainer ranks are prepared; return the number of engine ranks."""
        num_ranks = int(self.shared.get("ready"))
        if not num_ranks:
            raise SetFailed(_decode_failure(self.shared.get("failed")))
        return num_ranks

    def read_plan(self, rank: int) -> dict[int | Peer, list[Delivery]]:
        """Engine rank: return the deliveries of trainer ranks by sender, then those of the other
        engines."""
        self._num_ranks = self.await_prepared()
        plan = msgspec.msgpack.decode(self.shared.get(f"plan/{rank}"), type=PositionPlan)
        deliveries: dict[int | Peer, list[Delivery]] = dict(plan[self.member])
        for engine, senders in enumerate(plan):
            entered = [delivery for _, sent in senders for delivery in sent]
            if engine != self.member and entered:
                # By window, also where several trainer ranks send to that engine.
                deliveries[Peer(engine)] = sorted(entered, key=lambda delivery: delivery.slot)
        return deliveries

    def publish_complete(self, push: int) -> None:
        """Engine rank of a set of several engines: publish that it has all of a push."""
        if self.shared.add(f"has/{push}", 1) == self._num_ranks:
            self.shared.set(f"complete/{push}", "1")
            self.shared.delete_key(f"has/{push}")
            self.shared.delete_key(f"complete/{push - 1}")

    def await_complete(self, push: int) -> None:
        """Trainer rank: wait until all engine ranks have all of a push. An engine rank that does
        not get it has the time to report why."""
        seconds = self.push_seconds + 2 * ANSWER_SECONDS
        self._wait_for_keys(self.shared, [f"complete/{push}"], seconds)

    def release(self, rank: int, push: int, window: int) -> None:
        """Engine rank: publish that `window` is in use and its memory may be overwritten."""
        self.store.set(f"released/{rank}/{push}/{window}", "1")
        if push > 1:
            self.store.delete_key(f"released/{rank}/{push - 1}/{window}")

    def await_release(self, rank: int, push: int, window: int) -> None:
        """Wait for `release`, over a connection of this thread's own: on the shared one the release
        itself would wait for it."""
        if not hasattr(self._waiting, "store"):
            self._waiting.store = self.store.clone()  # type: ignore[attr-defined]
        store, key = self._waiting.store, f"released/{rank}/{push}/{window}"
        deadline = time.monotonic() + self.push_seconds
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                store.wait([key], datetime.timedelta(seconds=min(left, POLL_SECONDS)))
                return
            except DistStoreError:
                self._raise_failure()
                if left <= POLL_SECONDS:
                    raise

    def report(self, failure: Failure) -> Failure:
        """Publish a failure, unless there is one, and return the first."""
        encoded = msgspec.json.encode(failure).decode()
        first = self.shared.compare_set("failed", "", encoded)
        self.shared.set("ready", "0")  # ends the wait of all that are still connecting
        return _decode_failure(first)

    def report_error(self, error: str, *members: int) -> Failure:
        """Trainer rank: do as `report`, of an error with these members at fault; return that
        failure where the store is lost, too."""
        failure = Failure(error, list(members))
        try:
            return self.report(failure)
        except RuntimeError:
            return failure

    def report_own(self, rank: int, error: str, *, is_damaged: bool = False) -> Failure:
        """Engine rank: do as `report`, of a failure of this rank."""
        return self.report(Failure(f"{self._rank_name(rank)}: {error}", [self.member], is_damaged))

    def find_cause(self, rank: int, error: str, is_closing: Callable[[], bool]) -> Failure:
        """Engine rank whose exchange broke: return the failure of the rank at fault, which has
        published it, or else has died: then it does not answer."""
        answers = f"answer/{rank}"
        self.shared.append(answers, f"{self.member} ")  # type: ignore[attr-defined]
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and not is_closing():
            if self.shared.check(["failed"]):
                return _decode_failure(self.shared.get("failed"))
            if len(self.shared.get(answers).split()) == self.members:
                break
            time.sleep(0.1)
        answered = {int(engine) for engine in self.shared.get(answers).split()}
        silent = sorted(set(range(self.members)) - answered)
        if silent:
            names = ", ".join(map(str, silent))
            error = f"rank {rank} of engine {names} of the set has died or hangs: {error}"
        return self.report(Failure(error, silent))

    def _rank_name(self, rank: int) -> str:
        return f"engine {self.member} of the set, rank {rank}"

    def _wait_for_keys(self, store: Store, keys: Sequence[str], seconds: float) -> None:
        """Trainer rank 0: wait until the store has all keys. Its `wait` would log a warning every
        time that it ends to check for a failure."""
        deadline = time.monotonic() + seconds
        while not store.check(list(keys)):
            self._raise_failure()
            if time.monotonic() > deadline:
                raise DistStoreError(f"{self.engine}: {keys[-1]} is not there after {seconds:g} s")
            time.sleep(KEY_POLL_SECONDS)

    def _raise_failure(self) -> None:
        if self.shared.check(["failed"]):
            raise SetFailed(_decode_failure(self.shared.get("failed"))) from None


def report_failure(host: str, port: int, name: str, error: str) -> None:
    """Publish, on the controller, that an engine of the set `name` is gone, so that no rank waits
    for it.

    host, port: of the trainer's store. Raises torch.distributed.DistError where the trainer is gone
    as well."""
    timeout = datetime.timedelta(seconds=REPORT_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=timeout)
    Rendezvous(store, name, REPORT_SECONDS).report(Failure(error))


def _decode_failure(encoded: bytes) -> Failure:
    return msgspec.json.decode(encoded, type=Failure)
