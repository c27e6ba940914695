"""A rank of an engine with redundant experts: `python balanced_ranks.py RANK WORLD STORE`.

vLLM's own state, maps, policy and exchange (over gloo, through the host as on GPUs) on a model of
plain tensors, and the backend's own update around them: pushes with a rearrangement between each,
and one that a single rank cannot load. It prints, for every push, how many slots were wrong before
the experts were moved, and after."""

import contextlib
import datetime
import sys
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from vllm.distributed.eplb import eplb_communicator
from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState, _commit_eplb_maps
from vllm.distributed.eplb.policy import EPLB_POLICIES
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from megatron_r1.engines.plugin import backend, deepseek_patches, expert_placement

EXPERTS, COPIES, LAYERS = 6, 2, 3
SIZES = (5, 3)
"""Values of an expert in each of its two tensors."""


class LateCopies(TorchDistGlooStagedEplbCommunicator):
    """vLLM's exchange through the host, whose copies to the GPU run on a stream.

    Where it is the balancer's own, the caller's stream reads the receive buffer before they have
    run."""

    def execute(self) -> None:
        received = [tensor for kind, tensor, _ in self._ops if kind == "recv"]
        before = [tensor.clone() for tensor in received]
        super().execute()
        if self._stream is not None:
            for tensor, old in zip(received, before, strict=True):
                tensor.copy_(old)


STREAM = SimpleNamespace(synchronize=lambda: None)
"""The balancer's, which a CPU does not have."""


@contextlib.contextmanager
def streams_of_a_gpu():
    """Let vLLM's exchange find the streams that it uses on a GPU."""
    with (
        mock.patch.object(
            eplb_communicator, "device_stream", return_value=contextlib.nullcontext()
        ),
        mock.patch.object(eplb_communicator, "PIN_MEMORY", False),
        mock.patch.object(torch.accelerator, "current_stream", return_value=STREAM),
    ):
        yield


def update(balancer, group, load, push: int, sleeps: bool = False) -> list[str]:
    """Let the backend receive a push; return what it did, in order.

    Args:
        balancer: the stand-in for vLLM's `EplbState`, with real model states.
        group: of the ranks.
        load: what a rank does to load the push; it may raise.
        push: its number.
        sleeps: whether the engine sleeps between pushes."""
    done: list[str] = []

    def note(name, call=lambda *_, **__: None):
        def noted(*arguments, **keywords):
            done.append(name)
            return call(*arguments, **keywords)

        return noted

    engine = object.__new__(backend.PushTransferEngine)
    engine.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=sleeps), parallel_config=None
    )
    chunks = SimpleNamespace(wait=note("wait"), pop_changed_slots=set)
    engine._receiver = SimpleNamespace(
        received_chunks=chunks,
        table=SimpleNamespace(buffer=lambda *_: None, num_buffers=1),
        memory=None,
        free_memory=note("free"),
    )
    engine._models, engine._placed = None, []
    engine._load_check = SimpleNamespace(before_load=lambda _: None, after_load=note("check"))
    engine.balancer = balancer
    balancer.drain_async = note("drain")
    ranks = SimpleNamespace(cpu_group=group, device_group=group)
    with (
        mock.patch.object(backend, "get_ep_group", return_value=ranks),
        mock.patch.object(
            backend.layer_reload, "load_layers", note("load", lambda *_, **__: load())
        ),
        mock.patch.object(backend.layer_reload, "recompute_shared_tensors"),
        mock.patch.object(
            expert_placement, "keep_placement", note("keep", expert_placement.keep_placement)
        ),
        mock.patch.object(type(engine), "model_config", None, create=True),
    ):
        try:
            engine.receive_weights(SimpleNamespace(push_number=push, timeout_seconds=60.0))
        except (RuntimeError, ValueError) as error:
            done.append(f"{type(error).__name__}: {error}")
    return done


def value(push: int, layer: int, expert: int, tensor: int) -> torch.Tensor:
    """Return an expert's pushed values, which no other expert, layer or push has."""
    start = ((push * LAYERS + layer) * EXPERTS + expert) * 100.0 + 10 * tensor
    return start + torch.arange(SIZES[tensor], dtype=torch.float32)


def fill(model, rank: int, push: int) -> None:
    """Load a push as vLLM's loaders do: slot by slot of the first placement."""
    placed = EplbState.build_initial_global_physical_to_logical_map(EXPERTS, COPIES)
    local = model.expert_weights[0][0].shape[0]
    for layer, tensors in enumerate(model.expert_weights):
        for number, tensor in enumerate(tensors):
            for slot in range(local):
                tensor[slot] = value(push, layer, placed[rank * local + slot], number)


def num_wrong(state: EplbModelState, rank: int, push: int) -> int:
    """Return the slots of this rank that have not the expert of the balancer's maps."""
    wrong, local = 0, state.model.expert_weights[0][0].shape[0]
    for layer, tensors in enumerate(state.model.expert_weights):
        for slot in range(local):
            expert = int(state.physical_to_logical_map[layer, rank * local + slot])
            wrong += any(
                not torch.equal(tensor[slot], value(push, layer, expert, number))
                for number, tensor in enumerate(tensors)
            )
    return wrong


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    limit = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", f"file://{sys.argv[3]}", limit, world, rank)
    group = dist.group.WORLD
    local = (EXPERTS + COPIES) // world
    weights = [[torch.zeros(local, size) for size in SIZES] for _ in range(LAYERS)]
    model = SimpleNamespace(
        num_routed_experts=EXPERTS,
        num_redundant_experts=COPIES,
        num_physical_experts=EXPERTS + COPIES,
        num_logical_experts=EXPERTS,
        num_moe_layers=LAYERS,
        expert_weights=weights,
    )
    state = EplbModelState(
        physical_to_logical_map=torch.zeros(LAYERS, EXPERTS + COPIES, dtype=torch.int64),
        physical_to_logical_map_buffer=torch.zeros(LAYERS, EXPERTS + COPIES, dtype=torch.int64),
        logical_to_physical_map=torch.full((LAYERS, EXPERTS, 8), -1),
        logical_replica_count=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
        expert_load_pass=torch.ones(LAYERS, EXPERTS + COPIES, dtype=torch.int32),
        expert_load_pass_buffer=torch.ones(LAYERS, EXPERTS + COPIES, dtype=torch.int32),
        expert_load_window=torch.ones(4, LAYERS, EXPERTS + COPIES, dtype=torch.int32),
        last_expert_load=torch.ones(LAYERS, EXPERTS, dtype=torch.int64),
        model_name="small",
        model=model,
        expert_buffer=[torch.empty_like(each) for each in weights[0]],
        rebalanced=False,
        eplb_stats=None,
        device_index=None,
        communicator=LateCopies(group),
    )
    _commit_eplb_maps(state, expert_placement.first_placement(state))
    balancer = SimpleNamespace(model_states={"small": state}, async_worker=None)
    with streams_of_a_gpu():
        push_and_rearrange(balancer, group, rank, world)
    counts, loads = state.logical_replica_count, state.expert_load_window
    print(f"copies {counts[0].tolist()}, counted {int(loads.sum())}")
    if rank == 0:
        print(f"returned experts {returned_experts(state)}")
        print(f"slots of the drafter {slots_of_a_drafter()}")


def push_and_rearrange(balancer, group, rank: int, world: int) -> None:
    """Push four times, with a rearrangement after each of the first three."""
    (state,) = balancer.model_states.values()
    model, weights = state.model, state.model.expert_weights
    generator = torch.Generator().manual_seed(0)
    for push in range(1, 4):
        before = [0]

        def load(push=push, before=before):
            fill(model, rank, push)
            before[0] = num_wrong(state, rank, push)

        done = update(balancer, group, load, push)
        print(f"push {push}: {before[0]} wrong, then {num_wrong(state, rank, push)}")
        print(f"in order: {' '.join(done)}")
        load = torch.randint(1, 1000, (LAYERS, EXPERTS), generator=generator)
        load[:, push] = 100_000  # another hot expert each time
        placed = EPLB_POLICIES["default"].rebalance_experts(
            load, EXPERTS + COPIES, 1, 1, world, state.physical_to_logical_map
        )
        state.communicator.set_stream(None)
        rearrange_expert_weights_inplace(
            state.physical_to_logical_map,
            placed,
            weights,
            state.expert_buffer,
            group,
            state.communicator,
        )
        state.communicator.set_stream(STREAM)  # as the balancer's thread leaves it
        _commit_eplb_maps(state, placed)
        print(f"rearranged: {num_wrong(state, rank, push)} wrong")

    def fail_on_rank_1():
        if rank == 1:
            raise ValueError("a damaged chunk")

    print(f"one rank fails: {update(balancer, group, fail_on_rank_1, 4)[-1]}")
    ended = SimpleNamespace(is_alive=lambda: rank != 0)
    with_thread = SimpleNamespace(**vars(balancer) | {"async_worker": ended})
    print(f"thread ended: {update(with_thread, group, fail_on_rank_1, 4)[-1]}")
    before = [0]

    def load_last():
        fill(model, rank, 4)
        before[0] = num_wrong(state, rank, 4)

    done = update(balancer, group, load_last, 4, sleeps=True)
    print(f"after a sleep: {before[0]} wrong, then {num_wrong(state, rank, 4)}")
    print(f"in order: {' '.join(done)}")


def slots_of_a_drafter() -> list[list[int]]:
    """Return the slots into which loaders of MTP layers write expert 0: upstream's, and with the
    patch."""
    from vllm.model_executor.models import deepseek_mtp

    model = SimpleNamespace(
        num_redundant_experts=COPIES, named_parameters=lambda: iter([("experts.w13_weight", None)])
    )
    found = []
    for patch in (None, deepseek_patches.load_copies_into_drafters):
        if patch:
            patch(deepseek_mtp)
        mapping = deepseek_mtp.fused_moe_make_expert_params_mapping(
            model, "gate_proj", "down_proj", "up_proj", num_experts=EXPERTS
        )
        found.append(sorted({slot for _, name, slot, _ in mapping if "experts.0." in name}))
    return found


def returned_experts(state: EplbModelState) -> list[int]:
    """Return the experts that a router under the balancer records for a token."""

    class Router(BaseRouter):
        def _compute_routing(self, *_, **__):
            return torch.ones(1, 2), torch.tensor([[1, EXPERTS - 1]])

        @property
        def routing_method_type(self):
            raise NotImplementedError

    recorded: list[torch.Tensor] = []
    router = Router(2, EXPERTS)
    router.set_capture_fn(recorded.append)
    router._apply_eplb_mapping = lambda ids: state.logical_to_physical_map[0][ids][..., 0] + 100
    router._select_experts(torch.zeros(1, 4), torch.zeros(1, EXPERTS))
    return recorded[0][0].tolist()


if __name__ == "__main__":
    main()
