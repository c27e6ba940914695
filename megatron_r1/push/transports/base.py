"""The two ends of a transport.

An engine rank learns what it needs from vLLM's own loaders (`engines.plugin.loader_copies`) and
publishes a `SlotTable`: where in its memory each region of a Hugging Face tensor goes. Trainer
ranks answer with their `Delivery`s, and with every push send the bytes of each and a checksum."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron_r1.push.protocol import Delivery, ReceiverInfo, Relay, SlotTable
from megatron_r1.push.rendezvous import EngineRendezvous, TrainerRendezvous
from megatron_r1.push.transports.received_chunks import Arrivals


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
        """Bytes of all buffers together, each as large as the slot table."""
        return self.table.num_buffers * self.table.num_bytes

    @property
    def is_running(self) -> bool:
        """Whether any thread of this receiver has not ended."""
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
        """Return the memory for all buffers.

        Raises:
            ValueError: there is not enough memory.
        """

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
