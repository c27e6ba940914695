"""vLLM's weight-transfer backend of this project, for every transport.

Weights arrive while the engine generates (`ReceiveBuffer`). An update, for which the engine is
paused, waits until a push is complete and correct, and loads it layer by layer. An engine whose
update fails before that keeps all its old weights; a later failure leaves it unusable, with an
error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from megatron_r1.vllm_plugin import BACKEND_PREFIX, swap
from megatron_r1.vllm_plugin.cpu_patches import is_packed
from megatron_r1.vllm_plugin.memory_layout import lay_out, with_gaps
from megatron_r1.vllm_plugin.recorder import Copy, Parameter, record
from megatron_r1.weight_sync.receive.rendezvous import Rendezvous
from megatron_r1.weight_sync.transports import receiver_class
from megatron_r1.weight_sync.transports.base import Receiver


@dataclass
class PushInitInfo(WeightTransferInitInfo):
    """What an engine needs to meet the trainer's ranks."""

    store: list
    """[host, port] of the trainer's store."""
    engine: str
    """A name that is unique to this start of this engine."""
    tensors: list
    """[name, shape] of every tensor of the checkpoint."""
    memory_bytes: int | None = None
    """Limit per rank for weights in transit; None: as many as the weights have."""
    timeout_seconds: float = 600.0
    """For the trainer to connect."""
    push_seconds: float = 600.0
    """For a push."""


@dataclass
class PushUpdateInfo(WeightTransferUpdateInfo):
    """Which push the engine is to load."""

    push: int
    """Its number: one more than that of the engine's last push."""
    timeout_seconds: float = 600.0
    """For all of it to arrive."""


class PushTransferEngine(WeightTransferEngine[PushInitInfo, PushUpdateInfo]):
    """Weight-transfer backend `megatron_r1_<transport>`."""

    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo

    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        """Record what this rank needs, publish it, and begin to receive. Called again when another
        trainer takes over."""
        host, port = init_info.store
        store = TCPStore(host, port, is_master=False)
        seconds = init_info.timeout_seconds, init_info.push_seconds
        rendezvous = Rendezvous(store, init_info.engine, *seconds)
        parallel = self.vllm_config.parallel_config
        self._rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        try:
            copies: Mapping[Parameter, Sequence[Copy]] = record(self.model, init_info.tensors)
            copies = with_gaps(copies, lambda parameter: is_packed(parameter, self.model))
            in_place = current_platform.is_cpu()
            placed, table = lay_out(copies, init_info.memory_bytes, in_place=in_place)
            self.shutdown()
            self._placed = placed
            transport = self.config.backend.removeprefix(BACKEND_PREFIX)
            self._receiver = receiver_class(transport)(rendezvous, self._rank, table)
        except Exception as error:  # vLLM's loaders may raise anything
            rendezvous.publish_problem(self._rank, str(error) or repr(error))
            raise

    def start_weight_update(self) -> None:
        """Refuse an update before a trainer is connected, with ValueError."""
        if self._receiver is None:
            raise ValueError("no trainer is connected: init_weight_transfer_engine comes first")

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        """Wait for the push and load it. Raises ValueError where it is incomplete or damaged; with
        all weights in one window, the old weights are then unchanged."""
        receiver, push = self._receiver, update_info.push
        assert receiver is not None, "start_weight_update comes first"
        for window in range(receiver.table.num_windows):
            receiver.buffer.wait(push, window, update_info.timeout_seconds)
            placed = [at for at in self._placed if at.window == window]
            area = receiver.table.area(receiver.memory, push)
            swap.load(self.model, placed, area, in_place=receiver.table.areas > 1)
            receiver.rendezvous.release(self._rank, push, window)
        swap.finish(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
