"""The choice of each token's experts, which `patches` puts in the place of Megatron's.

Megatron scores a group of experts by its best topk / group_topk, where DeepSeek-V3 and its
descendants take the best two and DeepSeek-V2 the best one: with any other ratio tokens would
silently be routed differently. And with sigmoid it always normalizes the chosen scores, except for
one expert, which it never does (moe_utils.py:868, Megatron-Core 0.19.2)."""

from typing import Any

import torch
from torch import Tensor

from megatron_r1.models.experts import GROUP_SCORES


def route_tokens(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's weight of each expert and whether it is routed there, (T, experts), in
    the logits' dtype and bool, as Megatron's topk_routing_with_score_function does.

    Args:
        logits: (T, experts).
        topk: experts per token.
        use_pre_softmax: whether the weights are the scores as they are, instead of normalized over
            the chosen experts.
        num_groups: the number of groups of experts; None: without groups.
        group_topk: the number of groups, those with the best scores, whose experts may be chosen.
        scaling_factor: what the weights are multiplied with; None: 1.
        score_function: "softmax" or "sigmoid".
        expert_bias: (experts,), added to the scores for the choice alone.
        fused: False.
        router_replay: the recorded choice to follow; None: choose."""
    assert not fused, "no model here sets moe_router_fusion"
    fp32_logits = logits.float()
    scores = fp32_logits.softmax(-1) if score_function == "softmax" else fp32_logits.sigmoid()
    num_best = GROUP_SCORES[score_function]

    def choose(
        scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if group_topk:
            assert num_groups, "topk of groups without groups"
            scores = _within_groups(scores, num_groups, group_topk, num_best)
        return scores.topk(topk, dim=-1)

    basis = scores if expert_bias is None else scores + expert_bias
    limits = {"num_groups": num_groups, "group_topk": group_topk}
    if router_replay is None:
        _, experts = choose(basis, topk, **limits)
    else:
        _, experts = router_replay.get_replay_topk(basis, topk, *limits.values(), choose)
    weights = scores.gather(1, experts)
    if not use_pre_softmax:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = (weights * (scaling_factor or 1.0)).to(logits.dtype)
    is_routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return torch.zeros_like(logits).scatter(1, experts, weights), is_routed


def _within_groups(scores: Tensor, num_groups: int, group_topk: int, best: int) -> Tensor:
    """Return scores (T, experts), -inf outside the `group_topk` groups with the highest sums of
    their `best` highest scores."""
    grouped_scores = scores.unflatten(-1, (num_groups, -1))
    groups = grouped_scores.topk(best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
    is_left_out = torch.ones_like(grouped_scores[..., 0], dtype=torch.bool).scatter(
        1, groups, False
    )
    return grouped_scores.masked_fill(is_left_out[..., None], -torch.inf).flatten(1)
