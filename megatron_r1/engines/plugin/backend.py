"""vLLM's weight-transfer backend of this project, for every transport.

Weights arrive while the engine generates (`ReceivedChunks`). An update, for which the engine is
paused, waits until a push is complete and correct, and loads it layer by layer. An engine whose
update fails before that keeps all its old weights; a later failure leaves it unusable, with an
error. `load_check` verifies that it computes with what arrived."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import torch
from torch.distributed import TCPStore
from vllm.distributed import get_ep_group
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.platforms import current_platform

from megatron_r1.base.processes import timeline
from megatron_r1.base.transports import BACKEND_PREFIX
from megatron_r1.engines.plugin import expert_placement, layer_reload
from megatron_r1.engines.plugin.cpu_patches import is_packed
from megatron_r1.engines.plugin.load_check import LoadCheck
from megatron_r1.engines.plugin.loader_copies import CheckpointParameter, LoaderCopy, record_copies
from megatron_r1.engines.plugin.memory_layout import lay_out, with_gaps
from megatron_r1.engines.plugin.pushed_adapter import PushedAdapter
from megatron_r1.push.control_messages import (
    AdapterSettings,
    PushInitInfo,
    PushUpdateInfo,
    StoreUnreachable,
)
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.slots import SlotTable
from megatron_r1.push.transports import receiver_class
from megatron_r1.push.transports.base import Receiver

Message = TypeVar("Message", PushInitInfo, PushUpdateInfo)
TensorShapes = list[tuple[str, tuple[int, ...]]]
"""Name and shape of every tensor of a push (`PushInitInfo`)."""


class PushTransferEngine(WeightTransferEngine[PushInitInfo, PushUpdateInfo]):
    """Weight-transfer backend `megatron_r1_<transport>`."""

    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo

    drafter: torch.nn.Module | None = None
    """The MTP layer that vLLM drafts with (`engines.plugin.patches.expose_models`)."""
    balancer: EplbState | None = None
    """vLLM's balancer of experts (`engines.plugin.patches.expose_models`)."""
    lora: WorkerLoRAManager | None = None
    """vLLM's manager of adapters (`engines.plugin.patches.expose_models`)."""
    _receiver: Receiver | None = None
    _store: tuple[str, int] | None = None
    _recorded: tuple[TensorShapes, SlotTable] | None = None
    _adapter: PushedAdapter | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> PushInitInfo:
        """Return the message that vLLM hands over as a dict.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        return _decode_message(init_dict, PushInitInfo)

    def parse_update_info(self, update_dict: dict[str, Any]) -> PushUpdateInfo:
        """Return the message that vLLM hands over as a dict.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        return _decode_message(update_dict, PushUpdateInfo)

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        """Record what this rank needs, publish it, and begin to receive. Called again when another
        trainer takes over, and when the engine comes into another set."""
        host, port = init_info.store
        rendezvous = EngineRendezvous(
            _connect_to_store(host, port, init_info.timeout_seconds),
            init_info.name,
            init_info.timeout_seconds,
            init_info.push_timeout_seconds,
            member=init_info.member_index,
            num_members=init_info.num_members,
        )
        parallel = self.vllm_config.parallel_config
        self._rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        try:
            table = self._slot_table(init_info)
            previous_receiver, self._receiver = self._receiver, None
            memory = None
            if previous_receiver is not None:
                previous_receiver.close()
                # Another trainer gets new memory: it numbers its pushes anew, and would overwrite
                # the buffer in use.
                memory = (
                    previous_receiver.reusable_memory(table)
                    if init_info.store == self._store
                    else None
                )
            self._store = init_info.store
            transport = self.config.backend.removeprefix(BACKEND_PREFIX)
            self._receiver = receiver_class(transport)(
                rendezvous, self._rank, table, memory, init_info.allocates_per_push
            )
        except Exception as error:  # vLLM's loaders may raise anything
            rendezvous.publish_rank_failure(self._rank, f"{type(error).__name__}: {error}")
            raise

    def _slot_table(self, init_info: PushInitInfo) -> SlotTable:
        """Return what this rank needs, recorded once, and set where each parameter is received."""
        if init_info.adapter is not None:
            return self._adapter_table(init_info.adapter, init_info.tensors)
        self._adapter = None
        if self._recorded is None or self._recorded[0] != init_info.tensors:
            models = [self.model] if self.drafter is None else [self.model, self.drafter]
            self._models = torch.nn.ModuleList(models)
            copies: Mapping[CheckpointParameter, Sequence[LoaderCopy]] = record_copies(
                models, init_info.tensors
            )
            copies = with_gaps(copies, lambda parameter: is_packed(parameter, self._models))
            in_place = current_platform.is_cpu()
            self._placed, table = lay_out(copies, in_place=in_place)
            # As `lay_out` makes the slots of the table: one of every copy into every parameter.
            owners = [placement for placement in self._placed for _ in copies[placement.parameter]]
            self._load_check = LoadCheck(owners)
            self._recorded = init_info.tensors, table
        return self._recorded[1]

    def _adapter_table(self, settings: AdapterSettings, tensors: TensorShapes) -> SlotTable:
        if self.lora is None:
            raise ValueError("an adapter is pushed, and the engine was started without LoRA")
        if self._adapter is None:
            self._adapter = PushedAdapter(self.lora, settings, tensors)
        return self._adapter.table

    def start_weight_update(self) -> None:
        """Refuse an update before a trainer is connected, with ValueError."""
        if self._receiver is None:
            raise ValueError("no trainer is connected: init_weight_transfer_engine comes first")

    @timeline.timed("core/load weights")
    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        """Wait for the push and load it.

        Raises:
            ValueError: the push is incomplete or damaged, and the old weights are unchanged; or the
                engine would not compute with what arrived.
        """
        receiver = self._receiver
        assert receiver is not None, "start_weight_update comes first"
        if self.balancer is None or self._adapter is not None:
            self._load_push(receiver, update_info)
        else:
            self._load_with_balancer(receiver, update_info, self.balancer)
        receiver.free_memory()

    def _load_push(self, receiver: Receiver, update_info: PushUpdateInfo) -> None:
        """Wait for the push, load it and verify it."""
        push_number = update_info.push_number
        receiver.received_chunks.wait(push_number, update_info.timeout_seconds)
        buffer = receiver.table.buffer(receiver.memory, push_number)
        if self._adapter is not None:
            self._adapter.load(buffer)
            self._adapter.check(push_number)
            return
        self._load_check.before_load(receiver.received_chunks.pop_changed_slots())
        layer_reload.load_layers(
            self._models, self._placed, buffer, in_place=receiver.table.num_buffers > 1
        )
        self._load_check.after_load(push_number, self._placed, buffer)
        layer_reload.recompute_shared_tensors(self._models, self.model_config)

    def _load_with_balancer(
        self, receiver: Receiver, update_info: PushUpdateInfo, balancer: EplbState
    ) -> None:
        """Load a push while the balancer moves nothing, and place the experts afterwards."""
        ranks = get_ep_group()
        # Before anything that fails on one rank alone: the others would wait for it here.
        expert_placement.stop_rebalancing(balancer, ranks.cpu_group)
        try:
            self._load_push(receiver, update_info)
        except Exception as error:  # vLLM's loaders may raise anything
            expert_placement.raise_on_every_rank(error, ranks.cpu_group)
            raise
        expert_placement.raise_on_every_rank(None, ranks.cpu_group)
        if self.vllm_config.model_config.enable_sleep_mode:
            expert_placement.reset_placement(balancer)
        else:
            expert_placement.keep_placement(balancer, ranks.device_group)
            num_slots = expert_placement.count_moved_slots(balancer)
            # In the engine's log: the move is a part of the pause.
            print(f"push {update_info.push_number}: moved experts to {num_slots} slots", flush=True)

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` has loaded everything."""

    def shutdown(self) -> None:
        """Stop receiving and free the buffers."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def _decode_message(fields: dict[str, Any], kind: type[Message]) -> Message:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"the trainer's {kind.__name__} is of another form than this engine reads: {error}"
        ) from error


def _connect_to_store(host: str, port: int, timeout_seconds: float) -> TCPStore:
    """Return a connection to the trainer's store.

    Raises:
        StoreUnreachable: the store was not reached in time.
    """
    limit = datetime.timedelta(seconds=timeout_seconds)
    try:
        return TCPStore(host, port, is_master=False, timeout=limit)
    except RuntimeError as error:
        raise StoreUnreachable(
            f"the trainer's store at {host}:{port} was not reached within {timeout_seconds:g} s "
            "from the engine's host: a firewall is between them, or rollout.hosts_address is not "
            "an address of trainer rank 0's host that engines can reach"
        ) from error
