"""vLLM's weight-transfer backend of this project, for every transport.

Weights arrive while the engine generates (`ReceiveBuffer`). An update, for which the engine is
paused, waits until a push is complete and correct, and loads it layer by layer. An engine whose
update fails before that keeps all its old weights; a later failure leaves it unusable, with an
error."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from megatron_r1.base.processes import timeline
from megatron_r1.engines.plugin import BACKEND_PREFIX, swap
from megatron_r1.engines.plugin.cpu_patches import is_packed
from megatron_r1.engines.plugin.delivery import DeliveryCheck
from megatron_r1.engines.plugin.memory_layout import lay_out, with_gaps
from megatron_r1.engines.plugin.recorder import CheckpointParameter, LoaderCopy, record
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.results import StoreUnreachable
from megatron_r1.push.table import SlotTable
from megatron_r1.push.transports import receiver_class
from megatron_r1.push.transports.base import Receiver


@dataclass
class PushInitInfo(WeightTransferInitInfo):
    """The arguments with which an engine connects to the trainer's ranks."""

    store: list
    """[host, port] of the trainer's store."""
    name: str
    """Name of the set of equal engines that are connected together, unique to this connection."""
    tensors: list
    """[name, shape] of every tensor of the checkpoint."""
    member: int = 0
    """This engine's number in the set."""
    members: int = 1
    """Engines of the set."""
    timeout_seconds: float = 600.0
    """Time limit for the trainer to connect."""
    push_seconds: float = 600.0
    """Time limit of a push."""
    borrows_memory: bool = False
    """Whether the memory of weights in transit has another use between pushes."""


@dataclass
class PushUpdateInfo(WeightTransferUpdateInfo):
    """The push that the engine is to load."""

    push: int
    """Its number: one more than that of the engine's last push."""
    timeout_seconds: float = 600.0
    """Time limit for all of the push to arrive."""


class PushTransferEngine(WeightTransferEngine[PushInitInfo, PushUpdateInfo]):
    """Weight-transfer backend `megatron_r1_<transport>`."""

    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo

    drafter: torch.nn.Module | None = None
    """The MTP layer that vLLM drafts with (`engines.plugin.drafter`)."""
    _receiver: Receiver | None = None
    _store: list | None = None
    _recorded: tuple[list, SlotTable] | None = None

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        """Record what this rank needs, publish it, and begin to receive. Called again when another
        trainer takes over, and when the engine comes into another set."""
        host, port = init_info.store
        rendezvous = EngineRendezvous(
            connect_to_store(host, port, init_info.timeout_seconds),
            init_info.name,
            init_info.timeout_seconds,
            init_info.push_seconds,
            member=init_info.member,
            num_members=init_info.members,
        )
        parallel = self.vllm_config.parallel_config
        self._rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        try:
            table = self._table(init_info)
            before, self._receiver = self._receiver, None
            memory = None
            if before is not None:
                before.close()
                # Another trainer gets new memory: it numbers its pushes anew, and would overwrite
                # the area in use.
                memory = before.reusable_memory(table) if init_info.store == self._store else None
            self._store = init_info.store
            transport = self.config.backend.removeprefix(BACKEND_PREFIX)
            self._receiver = receiver_class(transport)(
                rendezvous, self._rank, table, memory, init_info.borrows_memory
            )
        except Exception as error:  # vLLM's loaders may raise anything
            rendezvous.report_own(self._rank, str(error) or repr(error))
            raise

    def _table(self, init_info: PushInitInfo) -> SlotTable:
        """Return what this rank needs, recorded once, and set where each parameter is received."""
        if self._recorded is None or self._recorded[0] != init_info.tensors:
            models = [self.model] if self.drafter is None else [self.model, self.drafter]
            self._models = torch.nn.ModuleList(models)
            copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]] = record(
                models, init_info.tensors
            )
            copies = with_gaps(copies, lambda parameter: is_packed(parameter, self._models))
            in_place = current_platform.is_cpu()
            self._placed, table = lay_out(copies, in_place=in_place)
            # As `lay_out` makes the slots of the table: one of every copy into every parameter.
            owners = [at for at in self._placed for _ in copies[at.parameter]]
            self._delivery = DeliveryCheck(owners)
            self._recorded = init_info.tensors, table
        return self._recorded[1]

    def start_weight_update(self) -> None:
        """Refuse an update before a trainer is connected, with ValueError."""
        if self._receiver is None:
            raise ValueError("no trainer is connected: init_weight_transfer_engine comes first")

    @timeline.timed("core/load weights")
    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        """Wait for the push and load it. Raises ValueError where it is incomplete or damaged; the
        old weights are then unchanged. Also raises ValueError where the engine would not compute
        with what arrived."""
        receiver, push = self._receiver, update_info.push
        assert receiver is not None, "start_weight_update comes first"
        receiver.buffer.wait(push, update_info.timeout_seconds)
        area = receiver.table.area(receiver.memory, push)
        self._delivery.begin(receiver.buffer.take_changed())
        swap.load(self._models, self._placed, area, in_place=receiver.table.areas > 1)
        self._delivery.end(push, self._placed, area)
        swap.finish(self._models, self.model_config)
        receiver.free_memory()

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def connect_to_store(host: str, port: int, timeout_seconds: float) -> TCPStore:
    """Return a connection to the trainer's store. Raises StoreUnreachable."""
    limit = datetime.timedelta(seconds=timeout_seconds)
    try:
        return TCPStore(host, port, is_master=False, timeout=limit)
    except RuntimeError as error:
        raise StoreUnreachable(
            f"the trainer's store at {host}:{port} was not reached within {timeout_seconds:g} s "
            "from the engine's host: a firewall is between them, or rollout.hosts_address is not "
            "an address of trainer rank 0's host that engines can reach"
        ) from error
