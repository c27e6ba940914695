"""The two ends of a transport, and the memory of an engine rank in which a push arrives: which
deliveries of the current push are there, and whether they are correct.

An engine rank learns what it needs from vLLM's own loaders (`engines.plugin.loader_copies`) and
publishes a `SlotTable`: where in that memory each region of a Hugging Face tensor goes. Trainer
ranks answer with their `Delivery`s, and with every push send the bytes of each and a checksum."""

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch

from megatron_r1.push.checksum import RunningChecksum
from megatron_r1.push.published_plan import ReceiverInfo, Relay
from megatron_r1.push.rendezvous import EngineRendezvous, TrainerRendezvous
from megatron_r1.push.results import IncompletePush
from megatron_r1.push.table import Delivery, SlotTable, slot_view


class Arrivals:
    """Which deliveries of the current push are in the memory of one engine rank.

    Pushes are numbered from 1. A transport writes into `memory` and reports each delivery to
    `delivery_arrived`, from any thread; the engine waits in `wait`.

    Args:
        table: the slots of this rank.
        memory: uint8, all receive buffers.
        deliveries: the deliveries of each trainer rank or `Relay`, in its order, the same in every
            push.
        is_weighted: whether checksums are weighted sums (`RunningChecksum`).

    Raises:
        ValueError: where the deliveries do not cover the table
    """

    def __init__(
        self,
        table: SlotTable,
        memory: torch.Tensor,
        deliveries: Mapping[Any, Sequence[Delivery]],
        is_weighted: bool = False,
    ):
        self._is_weighted = is_weighted
        check_coverage(table, chain.from_iterable(deliveries.values()))
        self.table, self.memory, self.deliveries = table, memory, deliveries
        self._arriving: dict[int, tuple[int, int, RunningChecksum]] = {}
        """Push, index and checksum so far of the current delivery of each sender."""
        self._push = dict.fromkeys(deliveries, 0)
        self._num_arrived = dict.fromkeys(deliveries, 0)
        """The push of each sender's last delivery, and how many of its deliveries of that push have
        arrived."""
        self.checksums: dict[tuple[Any, int], int] = {}
        """The sender's checksum of the delivery that arrived last, by sender and index."""
        self._loaded_checksums: dict[tuple[Any, int], int] = {}
        """The checksums of the push that was taken for loading last, by sender and index."""
        self._damaged: dict[int, dict[str, None]] = {}
        """The damaged tensors of each push, as an ordered set."""
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def rows_arrived(self, sender: Any, push: int, index: int, row: int) -> None:
        """Report that the rows of deliveries[sender][index] before `row` are in the memory."""
        self._running_checksum(sender, push, index).update_to(row)

    def delivery_arrived(self, sender: Any, push: int, index: int, sent: int) -> None:
        """Report that a delivery is in the memory.

        Args:
            sender: the trainer rank or `Relay` that has sent it.
            push: the number of the push.
            index: the delivery among the sender's.
            sent: the sender's checksum."""
        slot = self.deliveries[sender][index].slot
        is_right = self._running_checksum(sender, push, index).digest() == sent
        with self._changed:
            if not is_right:
                name = f"{self.table.slots[slot].name} (from rank {sender})"
                self._damaged.setdefault(push, {})[name] = None
            self.checksums[sender, index] = sent
            self._push[sender], self._num_arrived[sender] = push, index + 1
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Report that nothing more will arrive."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def wait(self, push: int, timeout_seconds: float, senders: Sequence[Any] | None = None) -> None:
        """Wait until all of `push` has arrived, or all that `senders` send of it.

        Raises IncompletePush, naming trainer ranks whose deliveries are late, and ValueError,
        naming the tensors whose checksums differ."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while late := self._late_senders(push, senders):
                left = deadline - time.monotonic()
                if self._failure is not None:
                    raise IncompletePush(f"push {push} broke off: {self._failure}")
                if left <= 0 or not self._changed.wait(left):
                    raise IncompletePush(
                        f"push {push}: after {timeout_seconds:g} s trainer ranks "
                        f"{', '.join(map(str, late))} have not sent all of it"
                    )
            damaged = list(self._damaged.get(push, ()))
        if damaged:
            raise ValueError(
                f"push {push}: {len(damaged)} tensors arrived otherwise than they were sent: "
                f"{_first_few(damaged)}"
            )

    def take_changed(self) -> set[int]:
        """Return the slots whose values differ from those of the last push that was loaded; pushes
        that were refused do not count."""
        with self._changed:
            changed = {
                self.deliveries[sender][index].slot
                for (sender, index), checksum in self.checksums.items()
                if self._loaded_checksums.get((sender, index), checksum) != checksum
            }
            self._loaded_checksums = dict(self.checksums)
        return changed

    def _running_checksum(self, sender: Any, push: int, index: int) -> RunningChecksum:
        arriving = self._arriving.get(sender)
        if arriving is None or arriving[:2] != (push, index):
            delivery = self.deliveries[sender][index]
            buffer = self.table.buffer(self.memory, push)
            values = slot_view(buffer, self.table.slots[delivery.slot], delivery)
            arriving = (push, index, RunningChecksum(values, self._is_weighted))
            self._arriving[sender] = arriving
        return arriving[2]

    def _late_senders(self, push: int, senders: Sequence[Any] | None) -> list[Any]:
        """Return those of the senders whose part of the push has not arrived."""
        return [
            sender
            for sender, deliveries in self.deliveries.items()
            if (senders is None or sender in senders)
            and (self._push[sender], self._num_arrived[sender]) < (push, len(deliveries))
        ]


def check_coverage(table: SlotTable, deliveries: Iterable[Delivery]) -> None:
    """Raise ValueError, naming tensors, where the deliveries leave out elements of a slot or hold
    some twice."""
    parts = defaultdict(list)
    for delivery in deliveries:
        parts[delivery.slot].append(delivery)
    problems = []
    for index, slot in enumerate(table.slots):
        slot_parts = parts.get(index, [])
        size = sum(part.num_elements for part in slot_parts)
        if size != slot.height * slot.width or _overlap(slot_parts):
            problems.append(f"{slot.name} ({size} of {slot.height * slot.width} elements)")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors would not be sent whole and once: {_first_few(problems)}"
        )


def _first_few(tensors: Sequence[str], count: int = 5) -> str:
    return ", ".join(tensors[:count]) + (", ..." if len(tensors) > count else "")


def _overlap(parts: list[Delivery]) -> bool:
    return any(
        max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(a.right, b.right)
        for i, a in enumerate(parts)
        for b in parts[:i]
    )


class Receiver(ABC):
    """An engine rank's end. Its constructor publishes `table`, waits for all trainer ranks' plans,
    and then receives their pushes in threads of its own.

    `address` is where senders reach this end, `senders` are the trainer ranks that send to this
    engine rank, and `rounds` is its part of a push in rounds.

    Args:
        rendezvous: the engine's rendezvous in its set.
        rank: the rank within the engine.
        table: the regions that this rank needs, with their places in `memory`.
        memory: uint8, all buffers; default `allocate`'s.
        borrows_memory: between pushes others need the memory; only NCCL's receiver frees it then.
    """

    address = ""
    is_closing = False
    """Whether `close` has been called."""
    is_weighted = False
    """Whether checksums are weighted sums also in host memory."""

    def __init__(
        self,
        rendezvous: EngineRendezvous,
        rank: int,
        table: SlotTable,
        memory: torch.Tensor | None = None,
        borrows_memory: bool = False,
    ):
        self.rendezvous, self.rank, self.table = rendezvous, rank, table
        self.borrows_memory = borrows_memory
        self._threads: list[threading.Thread] = []
        self.prepare()
        self.memory = self.allocate() if memory is None else memory
        try:
            rendezvous.publish_receiver(rank, ReceiverInfo(table, self.address))
            deliveries, self.rounds = rendezvous.read_plan(rank)
            self.senders = [source for source in deliveries if not isinstance(source, Relay)]
            self.arrivals = Arrivals(table, self.memory, deliveries, self.is_weighted)
            self.connect()
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """The bytes of all buffers."""
        return self.table.num_buffers * self.table.num_bytes

    @property
    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def start_thread(self, function: Callable[..., None], *arguments: object, name: str) -> None:
        """Run a function in a thread that `join_threads` waits for."""
        thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def join_threads(self, seconds: float) -> None:
        """Wait for all threads, at most so long. One that is still in a call when the interpreter
        ends would abort the process."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def prepare(self) -> None:  # noqa: B027 - not every transport needs something
        """Set what the other methods need; called first, on the thread of the constructor."""

    @abstractmethod
    def allocate(self) -> torch.Tensor:
        """Return the memory for all buffers. Raises ValueError when there is not enough."""

    def free_memory(self) -> None:  # noqa: B027 - most transports keep theirs
        """Free the memory until the next push, if it is borrowed. Called when all of a push has
        been loaded."""

    @abstractmethod
    def connect(self) -> None:
        """Begin to receive."""

    @abstractmethod
    def close(self) -> None:
        """Stop receiving and free all resources. A second call does nothing."""

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        """Return this receiver's memory for the use of another one with this table, once this one
        is closed; None where the other has to allocate its own. The engine may compute with weights
        in the memory."""
        return None


class Slices(Protocol):
    """Data of deliveries, looked up by position. values[i]: the data (height, width) of the i-th
    delivery, of any dtype."""

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


class Sender:
    """A trainer rank's end of the link to one engine rank. Call `plan`, `connect`, then `send` for
    every push, but where links are sent together, in planned rounds (`round_sender`).

    Args:
        rendezvous: this rank's rendezvous with the engine.
        sender: this trainer rank, from 0.
        rank: the engine rank, by its number within the engine.
        receiver: the address and the table of slots of that engine rank."""

    def __init__(
        self, rendezvous: TrainerRendezvous, sender: int, rank: int, receiver: ReceiverInfo
    ):
        self.rendezvous, self.sender, self.rank = rendezvous, sender, rank
        self.receiver, self.table = receiver, receiver.table

    def plan(self, deliveries: Sequence[Delivery]) -> None:
        """Prepare for the deliveries of every push."""
        self.deliveries = list(deliveries)

    def connect(self) -> None:
        """Connect to the receiver, once all trainer ranks are prepared."""

    def send(self, push: int, slices: Slices) -> None:
        """Send all deliveries; on return the slices may change."""
        raise NotImplementedError

    def close(self) -> None:
        """Free all resources. A second call does nothing."""


def gpu_uuid(device: torch.device | int) -> str:
    """Return the UUID of a GPU of this process: processes number GPUs differently."""
    return str(torch.cuda.get_device_properties(device).uuid)
