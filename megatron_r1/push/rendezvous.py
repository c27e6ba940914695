"""How the ranks of a set and of the trainer agree on the plan, on the beginning of each push, and
on a failure.

All sides use a torch.distributed store that the trainer hosts. Keys begin with the set's name,
which is new for every set. Trainer rank 0 reads the slot tables of all engine ranks (`TableStore`)
and passes them on to the other trainer ranks. The plan of an engine rank is one key, which is read
by that rank of each engine. So a rank makes a handful of requests to the store, whatever the number
of ranks."""

import datetime
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import xxhash
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from megatron_r1.push.control_messages import EngineSetFailure
from megatron_r1.push.protocol import (
    EngineRankChunks,
    PublishedPlan,
    RankRounds,
    ReceiverInfo,
    RelaySource,
    chunks_to,
)
from megatron_r1.push.slots import SlotTable, TensorChunk

ENGINE_SET_FAILURE_ERRORS = (OSError, RuntimeError, ValueError)
"""Errors that fail a set and not this rank; torch.distributed raises the second."""
IDLE_SECONDS = 30 * 24 * 3600.0
"""The time that an engine rank waits for the next push to begin."""
ANSWER_CHECKS, ANSWER_PAUSE = 50, 0.1
"""How often a rank that has seen a failure checks for an answer from the others, and the seconds
between two checks: 5 s, and longer on a machine so slow that checks themselves take long. They
count anew with each answer."""
GRACE_AFTER_LIMIT_SECONDS = 30.0
"""How much longer than a push's limit the trainer waits for engine ranks, so that these can first
report why they are late."""
REPORT_SECONDS = 10.0
"""The time limit for the controller to reach the store."""
FIRST_POLL_SECONDS, KEY_POLL_SECONDS = 0.001, 0.01
"""The pauses between checks whether keys are there, which grow from the first to the second."""


class EngineSetFailedError(ConnectionError):
    """Another rank of the set, or the controller, has reported `failure`."""

    def __init__(self, failure: EngineSetFailure):
        super().__init__(failure.error)
        self.failure = failure


def write_value(store: Store, key: str, value: Any) -> None:
    """Write a value, as `read_value` reads it.

    Args:
        store: where to.
        key: its name there.
        value: what msgspec encodes."""
    store.set(key, msgspec.msgpack.encode(value))  # type: ignore[arg-type]  # the stubs say str


def read_value(store: Store, key: str, kind: Any) -> Any:
    """Return a value that another process writes; wait until it is there.

    Args:
        store: where from.
        key: its name there.
        kind: its type."""
    return msgspec.msgpack.decode(store.get(key), type=kind)


class TableStore:
    """Publishes slot tables under their digest, so equal engines share one. Each table is published
    once and read once: one table per engine took 15 s for 64 engines, by digest 0.4 to 0.8 s."""

    def __init__(self, store: Store):
        self._store = PrefixStore("tables", store)
        self._tables: dict[str, SlotTable] = {}

    def publish(self, table: SlotTable) -> str:
        """Write the table, if it is new, and return its digest."""
        digest = xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(table))
        if not self._store.check([digest]):
            write_value(self._store, digest, table)
        return digest

    def get(self, digest: str) -> SlotTable:
        """Return the table, the same object every time."""
        if digest not in self._tables:
            self._tables[digest] = read_value(self._store, digest, SlotTable)
        return self._tables[digest]


class Rendezvous:
    """The meeting of engine number `member` of the set `name`, of `num_members` engines, with the
    trainer and with the other engines.

    Every call waits for the other side at most `timeout_seconds`, during a push
    `push_timeout_seconds` (default the same), and then raises torch.distributed.DistStoreError; it
    raises EngineSetFailedError as soon as a failure of the set has been published.

    Args:
        store: the trainer's store.
        name: the name of the set.
        timeout_seconds: the time limit of a call.
        push_timeout_seconds: the time limit of a call during a push.
        tables: the slot tables, which a process shares among the sets that it meets.
        member: the engine, by its number in the set.
        num_members: the engines of the set."""

    def __init__(
        self,
        store: Store,
        name: str,
        timeout_seconds: float,
        push_timeout_seconds: float | None = None,
        tables: TableStore | None = None,
        *,
        member: int = 0,
        num_members: int = 1,
    ):
        self.engine, self.timeout_seconds = f"{name}.{member}", timeout_seconds
        if push_timeout_seconds is None:
            push_timeout_seconds = timeout_seconds
        self.push_timeout_seconds = push_timeout_seconds
        self.member, self.num_members = member, num_members
        self.engine_store = PrefixStore(self.engine, store)
        self.engine_set_store = PrefixStore(name, store)
        self.engine_store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
        self._tables = tables or TableStore(store)

    def new_connection(self) -> Store:
        """Return a new connection to the store, for one thread: while a thread waits, all others
        that use its connection have to wait."""
        return self.engine_set_store.clone()  # type: ignore[attr-defined]  # missing in the stubs

    def wait_prepared(self) -> int:
        """Wait until all trainer ranks are prepared; return the number of engine ranks.

        Raises:
            EngineSetFailedError: a side failed before it was prepared.
        """
        num_ranks = int(self.engine_set_store.get("ready"))
        if not num_ranks:
            raise EngineSetFailedError(self._stored_failure())
        return num_ranks

    def publish_failure(self, failure: EngineSetFailure) -> EngineSetFailure:
        """Publish a failure, unless one has been published already, and return the first one."""
        # JSON, because `compare_set` takes text. A missing key compares as equal to "".
        first = self.engine_set_store.compare_set(
            "failed", "", msgspec.json.encode(failure).decode()
        )
        self.engine_set_store.set("ready", "0")  # ends the wait of all that are still connecting
        return msgspec.json.decode(first, type=EngineSetFailure)

    def raise_failure(self) -> None:
        """Raise EngineSetFailedError if a failure of the set has been published."""
        if self.has_failed():
            raise EngineSetFailedError(self._stored_failure()) from None

    def has_failed(self) -> bool:
        """Whether any side has published a failure."""
        return self.engine_set_store.check(["failed"])

    def publish_communicator(self, identifier: bytes) -> None:
        """Publish NCCL's id of the set's communicator."""
        self.engine_set_store.set("nccl", identifier)  # type: ignore[arg-type]  # the stubs say str

    def find_communicator(self) -> bytes | None:
        """Return NCCL's id of the set's communicator, once it is published."""
        return self.engine_set_store.get("nccl") if self.engine_set_store.check(["nccl"]) else None

    def publish_alive(self, name: str, push_number_in_set: int) -> None:
        """Publish that engine rank `name`, "member/rank", is alive in a push of the set."""
        self.engine_set_store.append(f"answers/{push_number_in_set}", f"{name} ")  # type: ignore[attr-defined]

    def is_alive_requested(self, push_number_in_set: int) -> bool:
        """Return whether a rank wants to know who is alive in a push of the set."""
        return self.engine_set_store.check([f"asked/{push_number_in_set}"])

    def diagnose_failure(
        self,
        names: Collection[str],
        push_number_in_set: int,
        error: str,
        is_closing: Callable[[], bool] = lambda: False,
    ) -> EngineSetFailure:
        """Return why the set's push broke: the failure that a rank has published, else the death
        of the engine ranks that do not answer.

        Args:
            names: the engine ranks, each "member/rank".
            push_number_in_set: the push, by its number in the set.
            error: the error that this rank has seen.
            is_closing: ends the wait for answers when it returns True."""
        self.engine_set_store.set(f"asked/{push_number_in_set}", "")
        key, answered_names, checks = f"answers/{push_number_in_set}", set[str](), 0
        while not answered_names.issuperset(names) and checks < ANSWER_CHECKS and not is_closing():
            if self.has_failed():
                return self._stored_failure()
            names_alive = (
                self.engine_set_store.get(key).decode().split()
                if self.engine_set_store.check([key])
                else []
            )
            checks = checks + 1 if answered_names.issuperset(names_alive) else 0
            answered_names = answered_names.union(names_alive)
            time.sleep(ANSWER_PAUSE)
        silent_ranks = sorted(
            tuple(map(int, name.split("/"))) for name in set(names) - answered_names
        )
        if silent_ranks:
            ranks_text = ", ".join(
                f"rank {rank} of engine {member}" for member, rank in silent_ranks
            )
            error = f"{ranks_text} of the set died or hangs: {error}"
        return self.publish_failure(
            EngineSetFailure(error, sorted({member for member, _ in silent_ranks}))
        )

    def _stored_failure(self) -> EngineSetFailure:
        return msgspec.json.decode(self.engine_set_store.get("failed"), type=EngineSetFailure)


class EngineRendezvous(Rendezvous):
    """The rendezvous as each rank of the engine has it."""

    _num_ranks = 0
    """Engine ranks of the whole set; known once the plan has been read."""

    def publish_receiver(self, rank: int, info: ReceiverInfo) -> None:
        """Publish the table and the address of engine rank `rank`."""
        write_value(
            self.engine_store, f"receiver/{rank}", (self._tables.publish(info.table), info.address)
        )

    def read_plan(
        self, rank: int
    ) -> tuple[dict[int | RelaySource, list[TensorChunk]], RankRounds | None]:
        """Return the chunks to this rank, by source, and over NCCL its rounds."""
        self._num_ranks = self.wait_prepared()
        plan = read_value(self.engine_set_store, f"plan/{rank}", PublishedPlan)
        rounds = plan.rounds[self.member] if plan.rounds is not None else None
        return chunks_to(plan.from_trainers, self.member), rounds

    def wait_push_begun(self, push_number_in_set: int, connection: Store) -> int:
        """Wait until a push of the set has begun, and return its number of the run; 0 where a rank
        of the set has closed.

        Args:
            push_number_in_set: the push, by its number in the set, counted from 1.
            connection: the calling thread's connection (`new_connection`)."""
        connection.wait([f"begun/{push_number_in_set}"], datetime.timedelta(seconds=IDLE_SECONDS))
        return int(connection.get(f"begun/{push_number_in_set}"))

    def end_waits(self, push_number_in_set: int) -> None:
        """End `wait_push_begun` in all ranks of the set."""
        self.engine_set_store.set(f"begun/{push_number_in_set}", "0")

    def publish_memory(self, rank: int, push_number_in_set: int, addresses: list[str]) -> None:
        """Publish where the trainer rank on this rank's GPU is to write a push.

        Args:
            rank: this rank within the engine.
            push_number_in_set: the push, by its number in the set.
            addresses: handles of the receive buffer and of the checksums (`export_ipc_handle`)."""
        write_value(self.engine_store, f"memory/{rank}/{push_number_in_set}", addresses)

    def publish_complete(self, push_number: int) -> None:
        """Publish that this rank, of a set of several engines, has all of a push."""
        if self.engine_set_store.add(f"has/{push_number}", 1) == self._num_ranks:
            self.engine_set_store.set(f"complete/{push_number}", "1")
            self.engine_set_store.delete_key(f"has/{push_number}")
            # The previous push's key only: trainer rank 0 may not have read this one's yet.
            self.engine_set_store.delete_key(f"complete/{push_number - 1}")

    def publish_rank_failure(
        self, rank: int, error: str, *, is_damaged: bool = False
    ) -> EngineSetFailure:
        """Publish a failure of this rank, so that no other waits for it; return the first failure.

        Args:
            rank: the rank within the engine.
            error: the description of the failure.
            is_damaged: whether what has arrived differs from what was sent.
        """
        error = f"engine {self.member} of the set, rank {rank}: {error}"
        return self.publish_failure(EngineSetFailure(error, [self.member], is_damaged))


class TrainerRendezvous(Rendezvous):
    """The rendezvous of a trainer rank with one engine."""

    def read_receivers(self, num_ranks: int) -> list[ReceiverInfo]:
        """Return table and address of all ranks of the engine; called on trainer rank 0."""
        keys = [f"receiver/{rank}" for rank in range(num_ranks)]
        self._wait_for_keys(self.engine_store, keys, self.timeout_seconds)
        records = [read_value(self.engine_store, key, tuple[str, str]) for key in keys]
        return [ReceiverInfo(self._tables.get(digest), address) for digest, address in records]

    def publish_plan(
        self,
        engine_rank: int,
        plan: EngineRankChunks,
        rounds: list[RankRounds | None] | None = None,
    ) -> None:
        """Publish the plan of one rank of all engines, over NCCL with its rounds.

        Args:
            engine_rank: the rank, by its number within each engine.
            plan: the chunks to it, by member.
            rounds: its sends and receives of every round, by member."""
        write_value(self.engine_set_store, f"plan/{engine_rank}", PublishedPlan(plan, rounds))

    def publish_prepared(self, num_senders: int, num_ranks: int) -> None:
        """Publish that this rank has published its plans and can be reached.

        Args:
            num_senders: the trainer ranks that do so.
            num_ranks: the ranks of all engines of the set."""
        if self.engine_set_store.add("prepared", 1) == num_senders:  # the last ends the wait of all
            self.engine_set_store.set("ready", str(num_ranks))

    def publish_push_begun(self, push_number_in_set: int, push_number: int) -> None:
        """Publish that push `push_number_in_set` of the set, `push_number` of the run, begins."""
        self.engine_set_store.set(f"begun/{push_number_in_set}", str(push_number))

    def read_memory(self, rank: int, push_number_in_set: int) -> list[str]:
        """Return where to write a push for engine rank `rank`, once that is published."""
        key = f"memory/{rank}/{push_number_in_set}"
        self._wait_for_keys(self.engine_store, [key], self.push_timeout_seconds)
        return read_value(self.engine_store, key, list[str])

    def wait_complete(self, push_number: int) -> None:
        """Wait until all engine ranks have all of a push; called on trainer rank 0."""
        self._wait_for_keys(
            self.engine_set_store,
            [f"complete/{push_number}"],
            self.push_timeout_seconds + GRACE_AFTER_LIMIT_SECONDS,
        )

    def report_error(self, error: str, *members: int) -> EngineSetFailure:
        """Publish an error as the failure, with these members at fault, and return the first
        failure; where the store is lost, that of this error."""
        failure = EngineSetFailure(error, list(members))
        try:
            return self.publish_failure(failure)
        except RuntimeError:
            return failure

    def _wait_for_keys(self, store: Store, keys: Sequence[str], seconds: float) -> None:
        """Wait until the store has all keys, or the set has failed."""
        try:
            wait_for_keys(store, keys, seconds, self.raise_failure)
        except DistStoreError as error:
            raise DistStoreError(f"{self.engine}: {error}") from error


def wait_for_keys(
    store: Store, keys: Sequence[str], seconds: float, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until the store has all keys. Its own `wait` would log a warning every time that it ends
    to check for a failure.

    Args:
        store: the trainer's store, or the part of it with a prefix.
        keys: names of values that other ranks write; an error names the last one.
        seconds: the time limit.
        check: raises an error when another rank has failed, so that the keys will not come.

    Raises:
        DistStoreError: at the time limit."""
    deadline, pause = time.monotonic() + seconds, FIRST_POLL_SECONDS
    while not store.check(list(keys)):
        check()
        if time.monotonic() > deadline:
            raise DistStoreError(f"{keys[-1]} is not there after {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, KEY_POLL_SECONDS)


def report_failure(host: str, port: int, name: str, error: str) -> None:
    """Publish that an engine of the set `name` is gone, so that no rank waits for it.

    Args:
        host: the host of the trainer's store.
        port: the port of the trainer's store.
        name: the name of the set.
        error: the description of the engine's failure.

    Raises:
        torch.distributed.DistError: where the trainer is gone as well.
    """
    timeout = datetime.timedelta(seconds=REPORT_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=timeout)
    Rendezvous(store, name, REPORT_SECONDS).publish_failure(EngineSetFailure(error))
