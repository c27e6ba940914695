"""What is timed, for every kind of implementation: a call on seeded inputs, with its gradients.

An implementation is given by a `load` function: it imports what it needs and returns the function
that computes. Such functions have one of these signatures, with further results after `...`:

    linear log-probabilities  (hidden (T, H), weight (V, H), targets (T,)) -> (logprobs (T,), ...)
    log-probabilities         (logits (T, V), targets (T,)) -> (logprobs (T,), ...)
    linear policy loss        (hidden, weight, targets, *loss_inputs) -> (loss, logprobs, ...)
    policy loss               (logprobs (T,), *loss_inputs) -> loss

Each helper here returns a call whose results have the names that the inputs' `errors` compares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tools.bench.kernels import eager
from tools.bench.kernels.implementation import Call, Implementation
from tools.bench.kernels.inputs import HiddenInputs, LogitsInputs, MatrixInputs, PolicyInputs

Load = Callable[[], Callable[..., Any]]


def on_hidden(
    inputs: HiddenInputs, load: Load, gradients: bool = False, policy: bool = False
) -> Call:
    """Linear log-probabilities. gradients: of the fixed upstream gradient; with `policy` those of
    the policy loss in eager PyTorch."""
    logprobs_of, tokens = load(), inputs.tokens
    leaves = inputs.leaves(gradients)

    def call():
        with torch.set_grad_enabled(gradients):
            logprobs, *_ = logprobs_of(*leaves, tokens.targets)
        results = {"logprobs": logprobs.detach()}
        if gradients:
            total, upstream = logprobs, inputs.upstream
            if policy:
                total, upstream = eager.policy_loss(logprobs, *tokens.loss_inputs), None
            results["hidden"], results["weight"] = torch.autograd.grad(total, leaves, upstream)
        return results

    return call


def on_logits(inputs: LogitsInputs, load: Load, gradients: bool = False) -> Call:
    """Log-probabilities from logits, and the gradient in the logits."""
    logprobs_of, targets = load(), inputs.tokens.targets

    def call():
        logits = inputs.logits if gradients else inputs.logits.detach()
        with torch.set_grad_enabled(gradients):
            logprobs, *_ = logprobs_of(logits, targets)
        results = {"logprobs": logprobs.detach()}
        if gradients:
            (results["logits"],) = torch.autograd.grad(logprobs, logits, inputs.upstream)
        return results

    return call


def linear_policy_loss(inputs: HiddenInputs, load: Load) -> Call:
    function, leaves, tokens = load(), inputs.leaves(True), inputs.tokens

    def call():
        loss, logprobs, *_ = function(*leaves, tokens.targets, *tokens.loss_inputs)
        hidden, weight = torch.autograd.grad(loss, leaves)
        return {"logprobs": logprobs.detach(), "hidden": hidden, "weight": weight}

    return call


def policy_loss(inputs: PolicyInputs, load: Load) -> Call:
    function = load()

    def call():
        loss = function(inputs.logprobs, *inputs.tokens.loss_inputs)
        (logprobs,) = torch.autograd.grad(loss, inputs.logprobs)
        return {"loss": loss.detach(), "logprobs": logprobs}

    return call


def quantize(inputs: MatrixInputs, load: Load) -> Call:
    function = load()

    def call():
        return dict(zip(("quantized", "scale"), function(inputs.x), strict=True))

    return call


def dequantize(inputs: MatrixInputs, load: Load) -> Call:
    function = load()

    def call():
        return {"values": function(inputs.quantized, inputs.scale, dtype=inputs.x.dtype)}

    return call


class Passes(NamedTuple):
    """One implementation in up to three tables. policy: with the policy loss in eager PyTorch."""

    forward: Implementation
    backward: Implementation
    policy: Implementation | None = None


def hidden_passes(name: str, load: Load, computes: str = "", gpu_only: bool = False) -> Passes:
    """computes: what the implementation does more or less than ours, in words."""
    make = partial(Implementation, name, gpu_only=gpu_only)
    with_loss = "; ".join(filter(None, [computes, "loss in eager PyTorch"]))
    return Passes(
        make(partial(on_hidden, load=load), computes),
        make(partial(on_hidden, load=load, gradients=True), computes),
        make(partial(on_hidden, load=load, gradients=True, policy=True), with_loss),
    )


def logits_passes(name: str, load: Load, computes: str = "", gradient: str = "", **how) -> Passes:
    """gradient: what `computes` adds in the backward pass. how: other fields of Implementation."""
    both = "; ".join(filter(None, [computes, gradient]))
    return Passes(
        Implementation(name, partial(on_logits, load=load), computes, **how),
        Implementation(name, partial(on_logits, load=load, gradients=True), both, **how),
    )
