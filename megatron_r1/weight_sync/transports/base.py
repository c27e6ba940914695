"""The two ends of a transport."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_r1.weight_sync.receive_buffer import ReceiveBuffer
from megatron_r1.weight_sync.rendezvous import (
    EngineRendezvous,
    Peer,
    ReceiverInfo,
    TrainerRendezvous,
)
from megatron_r1.weight_sync.table import Delivery, SlotTable


class Receiver(ABC):
    """An engine rank's end. Its constructor publishes `table`, waits for all trainer ranks' plans,
    and then receives their pushes in the background.

    memory: uint8, all areas; default `allocate`'s. borrows_memory: between pushes others need the
    memory; only NCCL's receiver frees it then. address: where senders reach this end. senders: the
    trainer ranks that send to this engine rank. rounds: its part of a push in rounds."""

    address = ""
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
        self.prepare()
        self.memory = self.allocate() if memory is None else memory
        try:
            rendezvous.publish_receiver(rank, ReceiverInfo(table, self.address))
            deliveries, self.rounds = rendezvous.read_plan(rank)
            self.senders = [source for source in deliveries if not isinstance(source, Peer)]
            self.buffer = ReceiveBuffer(table, self.memory, deliveries, self.is_weighted)
            self.connect()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:  # noqa: B027 - not every transport needs something
        """Set what the other methods need; called first, on the thread of the constructor."""

    @abstractmethod
    def allocate(self) -> torch.Tensor:
        """Return the memory for all areas. Raises ValueError when there is not enough."""

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
    every push, but where links are sent together, in planned rounds (`round_sender`)."""

    in_rounds = False

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
