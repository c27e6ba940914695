"""The implementations that are timed: each a call on seeded inputs, with its gradients.

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
from typing import Any

import torch
from torch import Tensor

from tools.bench.kernels import eager
from tools.bench.kernels.inputs import HiddenInputs, LogitsInputs, MatrixInputs, PolicyInputs

OURS = "r1_kernels"
TOO_LATE = "the time given was used up: raise --minutes, or use --only"
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Implementation:
    """One row of a table: call(function, inputs) is timed, for the function that `load` returns.

    load: imports what it needs and does what is not timed. computes: what it does more or less than
    ours, in words. overwrites: its inputs are restored after each call."""

    name: str
    call: Callable[..., Results]
    load: Callable[[], Any]
    computes: str = ""
    gpu_only: bool = False
    overwrites: bool = False


def with_gradients(row: Implementation, adds: str = "", **options: bool) -> Implementation:
    """Return `row` with its backward pass. adds: what that adds to `computes`."""
    call = partial(row.call, gradients=True, **options)
    return replace(row, call=call, computes="; ".join(filter(None, [row.computes, adds])))


def on_hidden(
    logprobs_of: Callable, inputs: HiddenInputs, gradients: bool = False, policy: bool = False
) -> Results:
    """Linear log-probabilities. gradients: of the fixed upstream gradient; with `policy` those of
    the policy loss in eager PyTorch."""
    leaves, tokens = inputs.leaves(gradients), inputs.tokens
    with torch.set_grad_enabled(gradients):
        logprobs, *_ = logprobs_of(*leaves, tokens.targets)
    results = {"logprobs": logprobs.detach()}
    if gradients:
        loss = eager.policy_loss(logprobs, *tokens.loss_inputs) if policy else None
        total, upstream = (logprobs, inputs.upstream) if loss is None else (loss, None)
        results["hidden"], results["weight"] = torch.autograd.grad(total, leaves, upstream)
    return results


def on_logits(logprobs_of: Callable, inputs: LogitsInputs, gradients: bool = False) -> Results:
    """Log-probabilities from logits, and the gradient in the logits."""
    logits = inputs.logits if gradients else inputs.logits.detach()
    with torch.set_grad_enabled(gradients):
        logprobs, *_ = logprobs_of(logits, inputs.tokens.targets)
    results = {"logprobs": logprobs.detach()}
    if gradients:
        (results["logits"],) = torch.autograd.grad(logprobs, logits, inputs.upstream)
    return results


def linear_policy_loss(function: Callable, inputs: HiddenInputs) -> Results:
    leaves, tokens = inputs.leaves(True), inputs.tokens
    loss, logprobs, *_ = function(*leaves, tokens.targets, *tokens.loss_inputs)
    hidden, weight = torch.autograd.grad(loss, leaves)
    return {"logprobs": logprobs.detach(), "hidden": hidden, "weight": weight}


def policy_loss(function: Callable, inputs: PolicyInputs) -> Results:
    loss = function(inputs.logprobs, *inputs.tokens.loss_inputs)
    (logprobs,) = torch.autograd.grad(loss, inputs.logprobs)
    return {"loss": loss.detach(), "logprobs": logprobs}


def quantize(function: Callable, inputs: MatrixInputs) -> Results:
    return dict(zip(("quantized", "scale"), function(inputs.x), strict=True))


def dequantize(function: Callable, inputs: MatrixInputs) -> Results:
    return {"values": function(inputs.quantized, inputs.scale, dtype=inputs.x.dtype)}


def primitive(function: Callable, inputs: Any) -> Results:
    """Call with `inputs.ExampleInputs` of a registered kernel."""
    return inputs.results(function(*inputs.arguments))


def why(error: BaseException) -> str:
    """Return the reason of a failure, in one line of the table."""
    text = " ".join(str(error).split())
    signs = ("ALLOC_FAILED", "out of memory", "can't allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in text for s in signs):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"needs the Python package {error.name}: see requirements/bench.txt"
    return f"{type(error).__name__}: {text[:110]}"
