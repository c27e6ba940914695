"""Puts redundant experts where vLLM's balancer has them, after a load of new weights.

A push fills every slot of a physical expert as vLLM's loaders do: the model's experts in order, and
behind them the copies, from the first (vLLM 0.32, distributed/eplb/eplb_state.py:
`EplbState.build_initial_global_physical_to_logical_map`).
Since the engine started, the balancer (`rollout.redundant_experts`) has moved experts and given its
copies to others, and the router follows its maps. So after a load

- `keep_placement` moves the new weights to where the maps say, by vLLM's own exchange;
- `reset_placement` puts the maps back to the first placement, for an engine that has slept: a sleep
  frees the memory of the maps, which is in vLLM's pool of weights, and the placement is lost.

The balancer moves experts in a thread and on a stream of its own, also between two steps of the
engine. `stop_rebalancing` ends that before a load, and before a sleep frees the weights
(`patches.stop_rebalancing_before_sleep`).

Each function is called on all ranks of an engine; `stop_rebalancing`, `raise_on_every_rank` and
`keep_placement` are collectives. The experts that a rank returns for routing replay are the
model's: vLLM records them before it looks up a copy (`BaseRouter.select_experts`)."""

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace


def first_placement(state: EplbModelState) -> torch.Tensor:
    """Return the expert in every slot after a load, (layers, physical experts), on the host."""
    model = state.model
    expert_of_slot = EplbState.build_initial_global_physical_to_logical_map(
        model.num_routed_experts, model.num_redundant_experts
    )
    return torch.tensor([expert_of_slot] * model.num_moe_layers)


def stop_rebalancing(state: EplbState, cpu_group: ProcessGroup) -> None:
    """Wait until the balancer moves nothing; what it had not applied is not applied.

    Args:
        state: the balancer.
        cpu_group: the engine's expert-parallel ranks, over gloo.

    Raises:
        RuntimeError: the balancer's thread has ended on a rank. vLLM logs its error and goes on;
            waiting for it would not end.
    """
    ended = state.async_worker is not None and not state.async_worker.is_alive()
    error = RuntimeError("the thread of vLLM's balancer has ended; its error is above in the log")
    raise_on_every_rank(error if ended else None, cpu_group)
    state.drain_async()


def raise_on_every_rank(error: Exception | None, cpu_group: ProcessGroup) -> None:
    """Raise on all ranks if one of them has an error, so that none waits for it in a collective.

    Args:
        error: this rank's error, which it raises; None for none.
        cpu_group: the engine's expert-parallel ranks, over gloo.

    Raises:
        RuntimeError: another rank has an error.
    """
    num_errors = torch.tensor(int(error is not None))
    all_reduce(num_errors, ReduceOp.SUM, cpu_group)
    if error is not None:
        raise error
    if num_errors:
        raise RuntimeError(
            f"{int(num_errors)} of the engine's {cpu_group.size()} ranks failed; "
            "their errors are in the log"
        )


def count_moved_slots(state: EplbState) -> int:
    """Return in how many slots of all ranks the balancer has put another expert than a load does.

    Args:
        state: the balancer, which moves nothing meanwhile.
    """
    return sum(
        int((first_placement(each) != each.physical_to_logical_map.cpu()).sum())
        for each in state.model_states.values()
    )


def keep_placement(state: EplbState, group: ProcessGroup) -> None:
    """Move the experts from the slots of a load to those of the balancer's maps.

    Args:
        state: the balancer, which moves nothing meanwhile.
        group: the process group of the engine's expert-parallel ranks.
    """
    if torch.accelerator.is_available():
        # Ranks may read each other's memory, where the load may still run.
        torch.accelerator.synchronize()
    for model_state in state.model_states.values():
        loaded_map = first_placement(model_state)
        current_map = model_state.physical_to_logical_map.cpu()
        if torch.equal(loaded_map, current_map):
            continue
        # The balancer's thread has set its own stream, on which received experts would be copied
        # to the buffer while this one reads it. It sets it again before it moves experts.
        model_state.communicator.set_stream(None)
        rearrange_expert_weights_inplace(
            loaded_map,
            current_map,
            model_state.model.expert_weights,
            model_state.expert_buffer,
            group,
            model_state.communicator,
        )


def reset_placement(state: EplbState) -> None:
    """Set the balancer's maps to the slots of a load, and forget what it has counted."""
    for model_state in state.model_states.values():
        eplb_state._commit_eplb_maps(model_state, first_placement(model_state))
        model_state.expert_load_pass.zero_()
        model_state.expert_load_window.zero_()
