"""The implementations that are timed: each a call on seeded inputs, with its gradients.

The peers among them, each imported when it is measured, are Apple's cut-cross-entropy 25.1.1,
Liger-Kernel 0.8.5, Megatron-Core 0.19.2 and TRL 1.16.

The calls take a function of one of these signatures, with further results after `...`:

    on_hidden           (hidden (T, H), weight (V, H), targets (T,)) -> (logprobs (T,), ...)
    on_logits           (logits (T, V), targets (T,)) -> (logprobs (T,), ...)
    linear_policy_loss  (hidden, weight, targets, *loss_inputs) -> (loss, logprobs, ...)
    policy_loss         (logprobs (T,), *loss_inputs) -> loss
    primitive           the arguments of a registered kernel's example

and return results by the names that the inputs' `errors` compares."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from r1_kernels_bench import eager
from r1_kernels_bench.eager import CLIP, KL_BETA
from r1_kernels_bench.inputs import HiddenInputs, LogitsInputs, MatrixInputs, PolicyInputs

OURS = "r1_kernels"
TOO_LATE = "the time given was used up: raise --minutes, or use --only"
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Implementation:
    """One row of a table: call(function, inputs) is timed, for the function that `load` returns.

    Attributes:
        name: its row of the table.
        call: the call that is timed.
        gpu_only: whether it needs a GPU.
        load: imports what it needs and does what is not timed.
        computes: what it does more or less than ours, in words.
        overwrites: its inputs are restored after each call."""

    name: str
    call: Callable[..., Results]
    load: Callable[[], Any]
    computes: str = ""
    gpu_only: bool = False
    overwrites: bool = False


def with_gradients(row: Implementation, adds: str = "", **options: bool) -> Implementation:
    """Return `row` with its backward pass.

    Args:
        row: an implementation.
        adds: what the backward pass adds to `computes`.
        **options: keyword arguments of the call."""
    call = partial(row.call, gradients=True, **options)
    return replace(row, call=call, computes="; ".join(filter(None, [row.computes, adds])))


def on_hidden(
    logprobs_of: Callable[..., Any],
    inputs: HiddenInputs,
    gradients: bool = False,
    policy: bool = False,
) -> Results:
    """Linear log-probabilities.

    Args:
        logprobs_of: the implementation.
        inputs: the case's tensors.
        gradients: whether to compute gradients, of the fixed upstream gradient.
        policy: whether they are of the policy loss in eager PyTorch."""
    leaves, tokens = inputs.leaves(gradients), inputs.tokens
    with torch.set_grad_enabled(gradients):
        logprobs, *_ = logprobs_of(*leaves, tokens.targets)
    results = {"logprobs": logprobs.detach()}
    if gradients:
        loss = eager.eager_policy_loss(logprobs, *tokens.loss_inputs) if policy else None
        output, upstream = (logprobs, inputs.upstream) if loss is None else (loss, None)
        results["hidden"], results["weight"] = torch.autograd.grad(output, leaves, upstream)
    return results


def on_logits(
    logprobs_of: Callable[..., Any], inputs: LogitsInputs, gradients: bool = False
) -> Results:
    """Log-probabilities from logits, and the gradient in the logits.

    Args:
        logprobs_of: computes log-probabilities from logits and targets.
        inputs: the tensors.
        gradients: whether the gradient is computed too."""
    logits = inputs.logits if gradients else inputs.logits.detach()
    with torch.set_grad_enabled(gradients):
        logprobs, *_ = logprobs_of(logits, inputs.tokens.targets)
    results = {"logprobs": logprobs.detach()}
    if gradients:
        (results["logits"],) = torch.autograd.grad(logprobs, logits, inputs.upstream)
    return results


def linear_policy_loss(function: Callable[..., Any], inputs: HiddenInputs) -> Results:
    leaves, tokens = inputs.leaves(True), inputs.tokens
    loss, logprobs, *_ = function(*leaves, tokens.targets, *tokens.loss_inputs)
    hidden, weight = torch.autograd.grad(loss, leaves)
    return {"logprobs": logprobs.detach(), "hidden": hidden, "weight": weight}


def on_kept_ids(
    call: Callable[..., Results], function: Callable[..., Any], inputs: HiddenInputs
) -> Results:
    """Make a call of our function with the ids that a sampler kept. Its results are not returned,
    as the exact ones are those of the whole vocabulary.

    Args:
        call: `on_hidden` or `linear_policy_loss`.
        function: what it calls.
        inputs: the case's tensors."""
    call(partial(function, sampling_mask=inputs.sampling_mask), inputs)
    return {}


def policy_loss(function: Callable[..., Any], inputs: PolicyInputs) -> Results:
    loss = function(inputs.logprobs, *inputs.tokens.loss_inputs)
    (logprobs,) = torch.autograd.grad(loss, inputs.logprobs)
    return {"loss": loss.detach(), "logprobs": logprobs}


def quantize(function: Callable[..., Any], inputs: MatrixInputs) -> Results:
    return dict(zip(("quantized", "scale"), function(inputs.x), strict=True))


def dequantize(function: Callable[..., Any], inputs: MatrixInputs) -> Results:
    return {"values": function(inputs.quantized, inputs.scale, dtype=inputs.x.dtype)}


def primitive(function: Callable[..., Any], inputs: Any) -> Results:
    """Call with `inputs.ExampleInputs` of a registered kernel."""
    return inputs.results(function(*inputs.arguments))


def describe_error(error: BaseException) -> str:
    """Return the reason of a failure, in one line of the table."""
    text = " ".join(str(error).split())
    signs = ("ALLOC_FAILED", "out of memory", "can't allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in text for s in signs):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"needs the Python package {error.name}: see requirements/bench.txt"
    return f"{type(error).__name__}: {text[:110]}"


VOCAB_CHUNK = 32_768  # what TRL's trainers pass


def _peer_loader(name: str) -> Callable[[], Any]:
    """Return a loader of `module:name`: a peer is imported when it is measured, if at all."""
    return partial(resolve_name, name)


LIGER_CROSS_ENTROPY = _peer_loader("liger_kernel.ops:LigerFusedLinearCrossEntropyFunction.apply")


def _load_cce(**overrides: None) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    options = {"reduction": "none", "impl": "cce", **overrides}
    return lambda *inputs: (-linear_cross_entropy(*inputs, **options),)


# Per-token losses without logits in memory. Its default leaves out blocks of small gradients.
CCE = Implementation(
    "cut-cross-entropy", on_hidden, _load_cce, "drops small gradients; no entropy", gpu_only=True
)
CCE_EXACT = replace(
    CCE,
    name="cut-cross-entropy, exact",
    load=partial(_load_cce, filter_eps=None),
    computes="no entropy",
)
# Without gradients there are none to drop.
CCE_FORWARD = replace(CCE_EXACT, name=CCE.name)


def _load_megatron() -> Callable[..., Any]:
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
    "Megatron-Core fused", on_logits, _load_megatron, "no entropy", overwrites=True
)


def _trl_chunked() -> Callable[..., Any]:
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
    _peer_loader("trl.kernels.logprob_entropy:selective_log_softmax_and_entropy"),
    gpu_only=True,
)


def _liger_token_cross_entropy() -> Callable[..., Any]:
    loss_of = LIGER_CROSS_ENTROPY()
    # After the targets: bias, class weights, ignored id, z-loss, label smoothing, reduction.
    options = None, None, -100, 0.0, 0.0, "none"
    return lambda *inputs: (-loss_of(*inputs, *options)[0],)


def _liger_scaled_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda *inputs: (-Function.apply(*inputs, return_entropy=True)[0],)


def _liger_linear_grpo() -> Callable[..., Any]:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the average over all masked tokens.
    return LigerFusedLinearGRPOLoss(
        beta=KL_BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )


def _linear_grpo(loss_of: Callable[..., Any], inputs: HiddenInputs) -> Results:
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


def _mean_cross_entropy(loss_of: Callable[..., Any], inputs: HiddenInputs) -> Results:
    loss = loss_of(inputs.hidden, inputs.weight, inputs.tokens.targets)[0]
    torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return {}


def _selective_log_softmax(function: Callable[..., Any], inputs: LogitsInputs) -> Results:
    targets, *_ = inputs.tokens.without_last
    logprobs = function(inputs.tokens.rows(inputs.logits.detach()), targets, temperature=1.0)
    # (S, L - 1) -> (S * L,): the last position of a sequence is masked and gets 0.
    return {"logprobs": torch.nn.functional.pad(logprobs, (0, 1)).flatten()}


def _triton_grpo(loss_of: Callable[..., Any], inputs: LogitsInputs) -> Results:
    targets, mask, old_logprobs, ref_logprobs = inputs.tokens.without_last
    loss, _ = loss_of(
        inputs.tokens.rows(inputs.logits),
        old_logprobs,
        ref_logprobs,
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
    _peer_loader("liger_kernel.ops.grpo_loss:fused_selective_log_softmax"),
    "no entropy",
    gpu_only=True,
)
LIGER_TRITON_GRPO = Implementation(
    "Liger triton_grpo_loss",
    _triton_grpo,
    _peer_loader("liger_kernel.transformers.grpo_loss:triton_grpo_loss"),
    "the policy loss too; no entropy, no log-probs out",
    gpu_only=True,
    overwrites=True,
)
