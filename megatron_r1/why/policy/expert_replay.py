"""Makes the routers of a transformers model choose the experts that the engine chose (R3, arXiv
2510.11370)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_r1.models.experts import expert_fields
from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.token_rows import TokenRow

ROUTER_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
"""The largest relative distance of a router's weights from `expert_weights` of its own choice."""


def row_replay(model: Any, rows: Sequence[TokenRow]) -> contextlib.AbstractContextManager[None]:
    """Return the block in which a model chooses the experts of the rows of a batch, if they have
    any."""
    longest = max(len(row.token_ids) for row in rows)
    shapes = [row.experts.shape[1:] for row in rows if row.experts is not None]
    if not shapes:
        return contextlib.nullcontext()
    experts = torch.full((len(rows), longest, *shapes[0]), -1, dtype=torch.int16)
    for index, row in enumerate(rows):
        if row.experts is not None:
            experts[index, : len(row.experts)] = row.experts
    return replayed_experts(model, experts.flatten(0, 1))


@contextlib.contextmanager
def replayed_experts(model: Any, experts: Tensor) -> Iterator[None]:
    """Let the model's routers choose the recorded experts in the block.

    Only the choice is replayed: the weights of the experts are the router's own scores.

    Args:
        model: transformers' model, of a mixture of experts.
        experts: (tokens, MoE layers, experts per token) int16, padding among the tokens; -1: the
            router chooses.

    Raises:
        CannotRecompute: a router computes its weights otherwise than `expert_weights`."""
    fields = expert_fields(resolve_aliases(model.config.to_dict()))
    handles = []
    for layer, router in enumerate(_find_routers(model)):

        def replay(
            module: Any,
            inputs: tuple[Any, ...],
            output: tuple[Tensor, Tensor, Tensor],
            layer: int = layer,
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, own_choice = output
            gap = (expert_weights(logits, own_choice, fields) - weights).abs()
            if bool((gap > ROUTER_ROUNDING[weights.dtype] * weights.abs()).any()):
                raise CannotRecompute(f"rl.routing_replay: {type(module).__name__} is not known")
            recorded = experts[:, layer].long()
            choice = torch.where(recorded >= 0, recorded, own_choice)
            return logits, expert_weights(logits, choice, fields).to(weights.dtype), choice

        handles.append(router.register_forward_hook(replay))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expert_weights(logits: Tensor, choice: Tensor, fields: dict[str, Any]) -> Tensor:
    """Return the weights of chosen experts, (tokens, experts per token) float32: their scores,
    divided by the sum over the chosen where the model does so, times its factor.

    Args:
        logits: (tokens, experts), of the router.
        choice: (tokens, experts per token) int64.
        fields: as `expert_fields` returns them."""
    logits = logits.float()
    is_sigmoid = fields["moe_router_score_function"] == "sigmoid"
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
    weights = scores.gather(1, choice)
    if not fields["moe_router_pre_softmax"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * fields["moe_router_topk_scaling_factor"]


def _find_routers(model: Any) -> list[torch.nn.Module]:
    """Return the routers of the layers, in their order."""
    blocks = [module for module in model.modules() if hasattr(module, "experts")]
    return [getattr(block, "gate", None) or block.router for block in blocks]
