"""The two ends of a transport.

An engine rank learns what it needs from vLLM's own loaders (`engines.plugin.loader_copies`) and
publishes a `SlotTable`: where in its memory each region of a Hugging Face tensor goes. Trainer
ranks answer with their `TensorChunk`s, and in every push send the bytes of each and a checksum."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron_r1.push.protocol import ReceiverInfo, RelaySource
from megatron_r1.push.rendezvous import EngineRendezvous, TrainerRendezvous
from megatron_r1.push.slots import SlotTable, TensorChunk
from megatron_r1.push.transports.received_chunks import ReceivedChunks


class Receiver(ABC):
    """An engine rank's end. Its constructor publishes `table`, waits for all trainer ranks' plans,
    and then receives their pushes in threads of its own.

    `address` is where senders reach this end, `senders` are the trainer ranks that send to this
    engine rank, and `rounds` is its part of a push in rounds.

    Args:
        rendezvous: the engine's rendezvous in its set.
        engine_rank: the rank within the engine.
        table: the regions that this rank needs, with their places in `memory`.
        memory: uint8, all buffers; default `allocate`'s.
        allocates_per_push: whether the memory is free for others between pushes; only NCCL's
            receiver frees it then.
    """

    address = ""
    is_closing = False
    """Whether `close` has been called."""
    uses_weighted_sum = False
    """Whether checksums are weighted sums also in host memory."""

    def __init__(
        self,
        rendezvous: EngineRendezvous,
        engine_rank: int,
        table: SlotTable,
        memory: torch.Tensor | None = None,
        allocates_per_push: bool = False,
    ):
        self.rendezvous, self.engine_rank, self.table = rendezvous, engine_rank, table
        self.allocates_per_push = allocates_per_push
        self._threads: list[threading.Thread] = []
        self.prepare()
        self.memory = self.allocate() if memory is None else memory
        try:
            rendezvous.publish_receiver(engine_rank, ReceiverInfo(table, self.address))
            chunks, self.rounds = rendezvous.read_plan(engine_rank)
            self.senders = [source for source in chunks if not isinstance(source, RelaySource)]
            self.received_chunks = ReceivedChunks(
                table, self.memory, chunks, self.uses_weighted_sum
            )
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
        """Run a function in a thread that `join_threads` waits for.

        Args:
            function: what runs.
            *arguments: its arguments.
            name: the thread's name."""
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
        """Free the memory until the next push, if it is allocated per push. Called when all of a
        push has been loaded."""

    @abstractmethod
    def connect(self) -> None:
        """Begin to receive."""

    @abstractmethod
    def close(self) -> None:
        """Stop receiving and free all resources. A second call does nothing."""

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        """Return the memory of this receiver, once it is closed, for another one with this table.
        None: the other has to allocate its own. The engine may compute with weights in the
        memory."""
        return None


class ChunkTensors(Protocol):
    """The data of a link's chunks: that of the i-th at [i], (height, width), of any dtype."""

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


class Sender:
    """A trainer rank's end of the link to one engine rank. Call `plan`, `connect`, then `send` for
    every push, but where links are sent together, in planned rounds (`round_sender`).

    Args:
        rendezvous: this rank's rendezvous with the engine.
        trainer_rank: this rank, from 0.
        engine_rank: the rank within the engine.
        receiver: the address and the table of slots of that engine rank."""

    def __init__(
        self,
        rendezvous: TrainerRendezvous,
        trainer_rank: int,
        engine_rank: int,
        receiver: ReceiverInfo,
    ):
        self.rendezvous, self.trainer_rank, self.engine_rank = rendezvous, trainer_rank, engine_rank
        self.receiver, self.table = receiver, receiver.table

    def plan(self, chunks: Sequence[TensorChunk]) -> None:
        """Prepare for the chunks of every push."""
        self.chunks = list(chunks)

    def connect(self) -> None:
        """Connect to the receiver, once all trainer ranks are prepared."""

    def send(self, push_number: int, chunk_tensors: ChunkTensors) -> None:
        """Send all chunks; on return the tensors may change."""
        raise NotImplementedError

    def close(self) -> None:
        """Free all resources. A second call does nothing."""


def gpu_uuid(device: torch.device | int) -> str:
    """Return the UUID of a GPU of this process: processes number GPUs differently."""
    return str(torch.cuda.get_device_properties(device).uuid)
