"""vLLM's weight-transfer backend of this project, for every transport.

Weights land while the engine generates (`ReceiveBuffer`); an update, for which the engine is
paused, waits until all of a push is there and right, and brings it into use layer by layer. An
engine whose update fails before that holds its old weights whole; what fails later leaves it
unusable, and says so.
"""

from dataclasses import dataclass

from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from megatron_r1.vllm_plugin import swap
from megatron_r1.vllm_plugin.cpu_patches import is_packed
from megatron_r1.vllm_plugin.memory_layout import lay_out, with_gaps
from megatron_r1.vllm_plugin.recorder import record
from megatron_r1.weight_sync.receive.rendezvous import Rendezvous
from megatron_r1.weight_sync.transports import Receiver, receiver_class


@dataclass
class LandingInit(WeightTransferInitInfo):
    store: list
    """[host, port] of the trainer's store."""
    engine: str
    """This start of this engine: a name that no other has."""
    tensors: list
    """[name, shape] of every tensor of the checkpoint."""
    memory_bytes: int | None = None
    """For landing weights, per rank; None: as many as they have."""
    timeout_seconds: float = 600.0
    """For the trainer to connect."""
    push_seconds: float = 600.0
    """For a push."""


@dataclass
class LandingUpdate(WeightTransferUpdateInfo):
    push: int
    """Its number: one more than that of the push before, on this engine."""
    timeout_seconds: float = 600.0
    """For all of it to arrive."""


class LandingEngine(WeightTransferEngine[LandingInit, LandingUpdate]):
    """Weight-transfer backend `megatron_r1_<transport>`."""

    init_info_cls = LandingInit
    update_info_cls = LandingUpdate
    transport = ""

    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: LandingInit) -> None:
        """Find out what this rank needs, say so, and begin to receive. May be called again, when
        another trainer has taken over."""
        host, port = init_info.store
        store = TCPStore(host, port, is_master=False)
        seconds = init_info.timeout_seconds, init_info.push_seconds
        meeting = Rendezvous(store, init_info.engine, *seconds)
        parallel = self.vllm_config.parallel_config
        self._rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        try:
            needed, keeps = record(self.model, init_info.tensors), current_platform.is_cpu()
            needed = with_gaps(needed, lambda parameter: is_packed(parameter, self.model))
            placed, table = lay_out(needed, init_info.memory_bytes, keeps=keeps)
            self.shutdown()
            self._placed = placed
            self._receiver = receiver_class(self.transport)(meeting, self._rank, table)
        except Exception as error:  # of vLLM's loaders too
            meeting.withdraw(self._rank, str(error) or repr(error))
            raise

    def start_weight_update(self) -> None:
        if self._receiver is None:
            raise ValueError("no trainer is connected: init_weight_transfer_engine comes first")

    def receive_weights(self, update_info: LandingUpdate) -> None:
        """Wait for the push and bring it into use.

        Raises:
            ValueError: it did not arrive as it was sent. With all weights in one window, nothing
                has changed then.
        """
        receiver, push = self._receiver, update_info.push
        for window in range(receiver.table.num_windows):
            receiver.inbox.wait(push, window, update_info.timeout_seconds)
            placed = [at for at in self._placed if at.window == window]
            area = receiver.table.area(receiver.memory, push)
            swap.load(self.model, placed, area, keep=receiver.table.areas > 1)
            receiver.meeting.release(self._rank, push, window)
        swap.finish(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class SharedMemoryEngine(LandingEngine):
    transport = "shm"


class DeviceEngine(LandingEngine):
    transport = "cuda_ipc"


class GlooEngine(LandingEngine):
    transport = "gloo"


class NcclEngine(LandingEngine):
    transport = "nccl"
