"""The clipped policy-gradient loss of PPO and GRPO, from log-probabilities.

Per token t of output i (DeepSeekMath arXiv 2402.03300 eq. 3; DeepSeek-R1 arXiv 2501.12948 eq. 1-2):

    ratio = exp(logprob - old_logprob)
    loss  = -min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A) + kl_beta · KL
    KL    = exp(ref - logprob) - (ref - logprob) - 1          (k3: unbiased and never negative)

`weights` decide the averaging: 1 on every response token, or 1 / |o_i| for GRPO's average over the
tokens of each output first; 0 hides a token. The result is a sum: the caller divides by the number
of tokens or outputs of the whole batch, which only it knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) ≈ 5e8: far beyond any clip, and its square still fits in fp32."""


class PolicyLoss(NamedTuple):
    """loss: () fp32, the weighted sum; the rest (T,) fp32 without gradient, 0 where hidden."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 10.0,
    clip_high: float = 10.0,
    kl_beta: float = 0.001,
) -> PolicyLoss:
    """Loss of (T,) tokens of any number of packed outputs.

    logprobs (with gradient), old_logprobs, ref_logprobs (None: no KL, allowed with kl_beta 0 only),
    advantages: (T,) fp32; mask: (T,) float weights ≥ 0. A token clipped in the direction its
    advantage pushes has no gradient.
    Raises ValueError for shapes that differ and for kl_beta > 0 without a reference.
    """
    tensors = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    if ref_logprobs is not None:
        tensors["ref_logprobs"] = ref_logprobs
    for name, tensor in tensors.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}"
            )
    if ref_logprobs is None and kl_beta:
        raise ValueError(f"kl_beta is {kl_beta}, but there are no ref_logprobs")
    seen = mask > 0
    # Hidden tokens may hold anything, NaN included: take them out before arithmetic, not after.
    log_ratio = torch.where(seen, logprobs - old_logprobs, 0.0).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = torch.where(seen, advantages, 0.0)
    plain = ratio * advantages
    limited = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = -torch.minimum(plain, limited)
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        gap = torch.where(seen, ref_logprobs - logprobs, 0.0).clamp(max=MAX_LOG_RATIO)
        kl = gap.exp() - gap - 1.0
        per_token = per_token + kl_beta * kl
    loss = (per_token * torch.where(seen, mask, 0.0)).sum()
    clipped = (limited < plain).float()
    return PolicyLoss(loss, ratio.detach(), clipped, kl.detach())
