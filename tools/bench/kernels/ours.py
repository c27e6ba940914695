"""r1_kernels as the trainer calls it (Triton on a GPU, plain PyTorch on a CPU), and the two
baselines of every table: eager PyTorch, and the same functions under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.bench.kernels import calls, eager
from tools.bench.kernels.eager import CLIP, KL_BETA
from tools.bench.kernels.implementation import OURS, Implementation

SETTINGS = {"clip_low": CLIP, "clip_high": CLIP, "kl_beta": KL_BETA}


def _linear_policy_loss():
    from r1_kernels import linear_policy_loss

    def function(*inputs):
        out = linear_policy_loss(*inputs, **SETTINGS)
        return out.loss, out.logprobs

    return function


def _policy_loss():
    from r1_kernels import policy_loss

    return lambda *inputs: policy_loss(*inputs, **SETTINGS).loss


def _linear_token_logprobs():
    from r1_kernels import linear_token_logprobs

    return linear_token_logprobs


def _token_logprobs(inplace: bool = False):
    from r1_kernels import token_logprobs

    def function(logits, targets):
        # A model's logits are not a leaf, and only such may be overwritten.
        return token_logprobs(logits.view_as(logits), targets, inplace_backward=inplace)

    return function


def _quantize():
    from r1_kernels import quantize_blockwise

    return quantize_blockwise


def _dequantize():
    from r1_kernels import dequantize_blockwise

    return dequantize_blockwise


def baselines(make: Callable, plain: Callable, computes: str = "") -> tuple[Implementation, ...]:
    """Return eager PyTorch and torch.compile. make: of calls.py; plain: a function of eager.py."""
    return (
        Implementation("eager PyTorch", partial(make, load=lambda: plain), computes),
        Implementation(
            "torch.compile", partial(make, load=lambda: eager.compiled(plain)), computes
        ),
    )


def _rows(
    make: Callable, ours: calls.Load, plain: Callable, computes: str = ""
) -> tuple[Implementation, ...]:
    return (Implementation(OURS, partial(make, load=ours)), *baselines(make, plain, computes))


LINEAR_POLICY_LOSS = _rows(calls.linear_policy_loss, _linear_policy_loss, eager.linear_policy_loss)
LINEAR_TOKEN_LOGPROBS, LINEAR_TOKEN_LOGPROBS_BACKWARD = (
    _rows(
        partial(calls.on_hidden, gradients=gradients),
        _linear_token_logprobs,
        eager.linear_token_logprobs,
    )
    for gradients in (False, True)
)
TOKEN_LOGPROBS = _rows(calls.on_logits, _token_logprobs, eager.token_logprobs)
_LOGITS_BACKWARD = partial(calls.on_logits, gradients=True)
TOKEN_LOGPROBS_BACKWARD = (
    Implementation(
        OURS, partial(_LOGITS_BACKWARD, load=lambda: _token_logprobs(inplace=True)), overwrites=True
    ),
    Implementation("r1_kernels, logits kept", partial(_LOGITS_BACKWARD, load=_token_logprobs)),
    *baselines(_LOGITS_BACKWARD, eager.token_logprobs),
)
POLICY_LOSS = _rows(calls.policy_loss, _policy_loss, eager.policy_loss, "no ratio, clip or KL out")
QUANTIZE = _rows(calls.quantize, _quantize, eager.quantize)
DEQUANTIZE = _rows(calls.dequantize, _dequantize, eager.dequantize)
