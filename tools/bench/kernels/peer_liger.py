"""Liger-Kernel 0.8.5. Sequences are padded rows, with one advantage each."""

from __future__ import annotations

import torch

from tools.bench.kernels.calls import hidden_passes
from tools.bench.kernels.eager import CLIP, KL_BETA
from tools.bench.kernels.implementation import Call, Implementation
from tools.bench.kernels.inputs import HiddenInputs, LogitsInputs

CROSS_ENTROPY = "Liger FusedLinearCrossEntropy"


def _cross_entropy():
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # After the targets: bias, class weights, ignored id, z-loss, label smoothing, reduction.
    options = None, None, -100, 0.0, 0.0, "none"
    return lambda *inputs: (-Function.apply(*inputs, *options)[0],)


def _scaled_cross_entropy():
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda *inputs: (-Function.apply(*inputs, return_entropy=True)[0],)


def _linear_grpo(inputs: HiddenInputs) -> Call:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the average over all masked tokens.
    loss_of = LigerFusedLinearGRPOLoss(
        beta=KL_BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )
    tokens, leaves = inputs.tokens, (inputs.hidden, inputs.weight)

    def call():
        loss, _ = loss_of(
            tokens.rows(inputs.hidden),
            inputs.weight,
            tokens.rows(tokens.targets),
            tokens.rows(tokens.mask),
            tokens.rows(tokens.advantages)[:, 0].contiguous(),
            ref_per_token_logps=tokens.rows(tokens.ref),
            old_per_token_logps=tokens.rows(tokens.old),
        )
        hidden, weight = torch.autograd.grad(loss, leaves)
        return {"hidden": hidden, "weight": weight}

    return call


def _mean_cross_entropy(inputs: HiddenInputs) -> Call:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    def call():
        loss = Function.apply(inputs.hidden, inputs.weight, inputs.tokens.targets)[0]
        torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
        return {}

    return call


def _selective_log_softmax(inputs: LogitsInputs) -> Call:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    tokens = inputs.tokens
    targets = tokens.rows(tokens.targets)[:, :-1].contiguous()

    def call():
        logits = tokens.rows(inputs.logits.detach())
        logprobs = fused_selective_log_softmax(logits, targets, temperature=1.0)
        # (S, L - 1) -> (S * L,): the last position of a sequence is masked and gets 0.
        return {"logprobs": torch.nn.functional.pad(logprobs, (0, 1)).flatten()}

    return call


def _triton_grpo(inputs: LogitsInputs) -> Call:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    tokens = inputs.tokens
    targets, mask, old, ref = (
        tokens.rows(part)[:, :-1].contiguous()
        for part in (tokens.targets, tokens.mask, tokens.old, tokens.ref)
    )
    advantages = tokens.rows(tokens.advantages)[:, 0].contiguous()

    def call():
        loss, _ = triton_grpo_loss(
            tokens.rows(inputs.logits),
            old,
            ref,
            targets,
            advantages,
            completion_mask=mask,
            temperature=1.0,
            beta=KL_BETA,
            eps_low=CLIP,
            eps_high=CLIP,
            loss_type="bnpo",
            reduce=True,
        )
        (logits,) = torch.autograd.grad(loss, inputs.logits)
        return {"logits": logits}

    return call


LINEAR_CE = hidden_passes(CROSS_ENTROPY, _cross_entropy, "no entropy", gpu_only=True)
SCALED_CE = hidden_passes("Liger FusedLinearScaledCE", _scaled_cross_entropy)
LINEAR_GRPO = Implementation("Liger FusedLinearGRPO", _linear_grpo, "no entropy, no log-probs out")
LINEAR_MEAN_CE = Implementation(
    CROSS_ENTROPY,
    _mean_cross_entropy,
    "mean cross entropy only: no ratio, clip, KL, entropy",
    gpu_only=True,
)
SELECTIVE = Implementation(
    "Liger selective_log_softmax", _selective_log_softmax, "no entropy", gpu_only=True
)
TRITON_GRPO = Implementation(
    "Liger triton_grpo_loss",
    _triton_grpo,
    "the policy loss too; no entropy, no log-probs out",
    gpu_only=True,
    overwrites=True,
)
