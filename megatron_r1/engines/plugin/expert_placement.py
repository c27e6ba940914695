"""Puts redundant experts where vLLM's balancer has them, after a load of new weights.

A push fills every slot of a physical expert as vLLM's loaders do: the model's experts in order, and
behind them the copies, from the first (vLLM 0.32, distributed/eplb/eplb_state.py:
`EplbState.build_initial_global_physical_to_logical_map`).
Since the engine started, the balancer (`rollout.redundant_experts`) has moved experts and given its
copies to others, and the router follows its maps. So after a load

- `keep_placement` moves the new weights to where the maps say, by vLLM's own exchange;
- `reset_placement` puts the maps back to the first placement, for an engine that has slept: a sleep
  frees the memory of the maps, which is in vLLM's pool of weights, and the placement is lost.

Each of them is called on all ranks of an engine. The experts that a rank returns for routing replay
are the model's: vLLM records them before it looks up a copy (`BaseRouter.select_experts`)."""

from typing import Any

import torch
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


def stop_rebalancing(state: EplbState) -> None:
    """Wait until the balancer moves nothing; what it had not applied is not applied."""
    state.drain_async()


def keep_placement(state: EplbState, group: Any) -> None:
    """Move the experts from the slots of a load to those of the balancer's maps.

    Args:
        state: the balancer, which moves nothing meanwhile.
        group: the process group of the engine's expert-parallel ranks.
    """
    for model_state in state.model_states.values():
        loaded_map = first_placement(model_state)
        current_map = model_state.physical_to_logical_map.cpu()
        if torch.equal(loaded_map, current_map):
            continue
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
