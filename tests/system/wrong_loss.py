"""GRPO with a planted fault in its loss, found on PYTHONPATH; `rl.options.fault` names it."""

from itertools import pairwise

import torch

from megatron_r1.config.algorithms import AlgorithmRules

RULES = AlgorithmRules(options={"fault": "none"})
FAULTS = ("kl_sign", "kl_slope", "counts_prompts")


def loss(batch, head, settings):
    from megatron_r1.trainer.losses import LossSum, loss_denominator
    from megatron_r1.trainer.metrics import Maximum, Mean

    fault = settings.options["fault"]
    logprobs, entropy = head.logprobs()
    mask = batch.is_response
    ratio = torch.where(mask, logprobs - batch.logprobs["old"], 0.0).exp()
    g = torch.where(mask, batch.logprobs["ref"] - logprobs, 0.0).double()
    kl = (g.expm1() - g).float()
    if fault == "kl_slope":  # the value is right, its gradient has the other sign
        kl = 2 * kl.detach() - kl
    sign = -1.0 if fault == "kl_sign" else 1.0
    terms = -ratio * batch.advantages + sign * settings.kl_beta * kl
    lengths = torch.ones_like(ratio)
    borders = batch.cu_seqlens.tolist()
    for first, end in pairwise(borders):
        # A sample's last position predicts nothing: its tokens are one more than its targets.
        counted = end - first if fault == "counts_prompts" else int(mask[first:end].sum())
        lengths[first:end] = max(1, counted)
    total = (torch.where(mask, terms / lengths, 0.0)).sum()
    count, tokens = loss_denominator(batch, "sequence"), mask.sum()
    metrics = {
        "ratio/max": Maximum(torch.where(mask, ratio, 0.0).amax().detach()),
        "loss": Mean(total.detach(), count),
        "kl": Mean(kl.detach()[mask].sum(), tokens),
        "clip_fraction": Mean(torch.zeros(()), tokens),
        "entropy": Mean(entropy.detach()[mask].sum(), tokens),
    }
    return LossSum(total, count, metrics)
