"""Apple's cut-cross-entropy 25.1.1, Liger-Kernel 0.8.5, Megatron-Core 0.16.1 and TRL 1.16."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch

from tools.bench.kernels.calls import Implementation, Results, on_hidden, on_logits
from tools.bench.kernels.eager import CLIP, KL_BETA
from tools.bench.kernels.inputs import HiddenInputs, LogitsInputs

VOCAB_CHUNK = 32_768  # what TRL's trainers pass


def _imported(name: str) -> Callable[[], Any]:
    """Return a loader of `module:name`: a peer is imported when it is measured, if at all."""
    return partial(resolve_name, name)


LIGER_CROSS_ENTROPY = _imported("liger_kernel.ops:LigerFusedLinearCrossEntropyFunction.apply")


def _cce(**more: None) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    options = {"reduction": "none", "impl": "cce", **more}
    return lambda *inputs: (-linear_cross_entropy(*inputs, **options),)


# Per-token losses without logits in memory. Its default leaves out blocks of small gradients.
CCE = Implementation(
    "cut-cross-entropy", on_hidden, _cce, "drops small gradients; no entropy", gpu_only=True
)
CCE_EXACT = replace(
    CCE, name="cut-cross-entropy, exact", load=partial(_cce, filter_eps=None), computes="no entropy"
)
# Without gradients there are none to drop.
CCE_FORWARD = replace(CCE_EXACT, name=CCE.name)


def _megatron() -> Callable:
    """The vocabulary-parallel cross entropy that Megatron-Core fuses, on a group of one."""
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def logprobs(logits, targets):
        # Its shape is (sequence, batch, vocabulary).
        losses = fused_vocab_parallel_cross_entropy(
            logits[:, None], targets[:, None], dist.group.WORLD
        )
        return (-losses[:, 0],)

    return logprobs


# It exponentiates fp32 logits in place.
MEGATRON = Implementation(
    "Megatron-Core fused", on_logits, _megatron, "no entropy", overwrites=True
)


def _trl_chunked() -> Callable:
    from trl.kernels import ChunkedLogProbFunction

    # After the targets: temperature, chunk, soft cap, scale of the logits, further results.
    settings = 1.0, VOCAB_CHUNK, None, 1.0, ("entropy",)
    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, *settings
    )


TRL_CHUNKED = Implementation("TRL chunked", on_hidden, _trl_chunked)
TRL_LOGITS = Implementation(
    "TRL log_softmax_and_entropy",
    on_logits,
    _imported("trl.kernels.logprob_entropy:selective_log_softmax_and_entropy"),
    gpu_only=True,
)


def _liger_token_cross_entropy() -> Callable:
    loss_of = LIGER_CROSS_ENTROPY()
    # After the targets: bias, class weights, ignored id, z-loss, label smoothing, reduction.
    options = None, None, -100, 0.0, 0.0, "none"
    return lambda *inputs: (-loss_of(*inputs, *options)[0],)


def _liger_scaled_cross_entropy() -> Callable:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda *inputs: (-Function.apply(*inputs, return_entropy=True)[0],)


def _liger_linear_grpo() -> Callable:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the average over all masked tokens.
    return LigerFusedLinearGRPOLoss(
        beta=KL_BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )


def _linear_grpo(loss_of: Callable, inputs: HiddenInputs) -> Results:
    tokens = inputs.tokens
    loss, _ = loss_of(
        tokens.rows(inputs.hidden),
        inputs.weight,
        tokens.rows(tokens.targets),
        tokens.rows(tokens.mask),
        tokens.sequence_advantages,
        ref_per_token_logps=tokens.rows(tokens.ref),
        old_per_token_logps=tokens.rows(tokens.old),
    )
    hidden, weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return {"hidden": hidden, "weight": weight}


def _mean_cross_entropy(loss_of: Callable, inputs: HiddenInputs) -> Results:
    loss = loss_of(inputs.hidden, inputs.weight, inputs.tokens.targets)[0]
    torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return {}


def _selective_log_softmax(function: Callable, inputs: LogitsInputs) -> Results:
    targets, *_ = inputs.tokens.without_last
    logprobs = function(inputs.tokens.rows(inputs.logits.detach()), targets, temperature=1.0)
    # (S, L - 1) -> (S * L,): the last position of a sequence is masked and gets 0.
    return {"logprobs": torch.nn.functional.pad(logprobs, (0, 1)).flatten()}


def _triton_grpo(loss_of: Callable, inputs: LogitsInputs) -> Results:
    targets, mask, old, ref = inputs.tokens.without_last
    loss, _ = loss_of(
        inputs.tokens.rows(inputs.logits),
        old,
        ref,
        targets,
        inputs.tokens.sequence_advantages,
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


LIGER_CE = Implementation(
    "Liger FusedLinearCrossEntropy",
    on_hidden,
    _liger_token_cross_entropy,
    "no entropy",
    gpu_only=True,
)
LIGER_MEAN_CE = Implementation(
    LIGER_CE.name,
    _mean_cross_entropy,
    LIGER_CROSS_ENTROPY,
    "mean cross entropy only: no ratio, clip, KL, entropy",
    gpu_only=True,
)
LIGER_SCALED_CE = Implementation(
    "Liger FusedLinearScaledCE", on_hidden, _liger_scaled_cross_entropy
)
LIGER_LINEAR_GRPO = Implementation(
    "Liger FusedLinearGRPO", _linear_grpo, _liger_linear_grpo, "no entropy, no log-probs out"
)
LIGER_SELECTIVE = Implementation(
    "Liger selective_log_softmax",
    _selective_log_softmax,
    _imported("liger_kernel.ops.grpo_loss:fused_selective_log_softmax"),
    "no entropy",
    gpu_only=True,
)
LIGER_TRITON_GRPO = Implementation(
    "Liger triton_grpo_loss",
    _triton_grpo,
    _imported("liger_kernel.transformers.grpo_loss:triton_grpo_loss"),
    "the policy loss too; no entropy, no log-probs out",
    gpu_only=True,
    overwrites=True,
)
