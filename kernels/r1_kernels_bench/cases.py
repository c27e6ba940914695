"""The tables: each kernel with its inputs, its implementations and its share of the time.

r1_kernels is called as the trainer calls it (Triton on a GPU, plain PyTorch on a CPU). The two
baselines of every table are eager PyTorch, and the same functions under torch.compile. A kernel of
`r1_kernels.registry` that no public function's table includes gets a table of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import r1_kernels
import torch
from r1_kernels.registry import KERNELS, Kernel, load_primitives

from r1_kernels_bench import eager
from r1_kernels_bench import implementations as calls
from r1_kernels_bench import implementations as peers
from r1_kernels_bench.implementations import OURS, Implementation, Results, with_gradients
from r1_kernels_bench.inputs import (
    KEPT_IDS,
    ExampleInputs,
    HiddenInputs,
    LogitsInputs,
    MatrixInputs,
    PolicyInputs,
)

CLIP = eager.CLIP
LOSS_SETTINGS: dict[str, Any] = {"clip_low": CLIP, "clip_high": CLIP, "kl_beta": eager.KL_BETA}


@dataclass(frozen=True)
class KernelCase:
    """One computation that is measured in several implementations.

    Attributes:
        name: the case.
        about: what it computes.
        inputs: makes its inputs.
        implementations: the rows of its table.
        gradients: whether the bound counts the gradients.
        masked: whether the bound leaves masked tokens out.
        weight: about its share of the run's time."""

    name: str
    about: str
    inputs: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    gradients: bool = False
    masked: bool = False
    weight: int = 1


def _linear_policy_loss(*inputs, sampling_mask=None):
    out = r1_kernels.linear_policy_loss(
        *inputs, **(LOSS_SETTINGS | {"sampling_mask": sampling_mask})
    )
    return out.loss, out.logprobs


def _policy_loss(*inputs):
    return r1_kernels.policy_loss(*inputs, **LOSS_SETTINGS).loss


class _AsComputed(torch.autograd.Function):
    """Returns a leaf's values, in its memory, as the result of an operation: a model's logits are
    no leaf, nor a view of one, and only such may be overwritten."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _token_logprobs(logits: Any, targets: Any, inplace: bool = False) -> Any:
    return r1_kernels.token_logprobs(_AsComputed.apply(logits), targets, inplace_backward=inplace)


def _with_baselines(
    call: Callable[..., Results],
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    computes: str = "",
) -> tuple[Implementation, ...]:
    """Return ours and the baselines.

    Args:
        call: calls an implementation with the inputs.
        ours: the function of r1_kernels.
        eager: the function of `eager`.
        computes: what the baselines do more or less, in words."""
    # One specialized graph for this call, as a training step would have.
    compile_eager = partial(torch.compile, eager, dynamic=False)
    return (
        Implementation(OURS, call, lambda: ours),
        Implementation("eager PyTorch", call, lambda: eager, computes),
        Implementation("torch.compile", call, compile_eager, computes),
    )


def _on_kept_ids(call: Callable[..., Results], ours: Callable[..., Any]) -> Implementation:
    """Return ours where a sampler has kept few ids.

    Args:
        call: what is timed of all ids.
        ours: the function that it calls."""
    computes = f"softmax over {KEPT_IDS} ids a token"
    return Implementation(
        "r1_kernels, kept ids", partial(calls.on_kept_ids, call), lambda: ours, computes
    )


_ON_HIDDEN = _with_baselines(
    calls.on_hidden, r1_kernels.linear_token_logprobs, eager.eager_linear_token_logprobs
)
_ON_LOGITS = _with_baselines(calls.on_logits, _token_logprobs, eager.eager_token_logprobs)
_IN_PLACE = Implementation(
    OURS, calls.on_logits, lambda: partial(_token_logprobs, inplace=True), overwrites=True
)
_KEPT = Implementation("r1_kernels, logits kept", calls.on_logits, lambda: _token_logprobs)

_FUNCTIONS = (
    KernelCase(
        "linear_policy_loss",
        "policy loss from hidden states, forward and backward",
        HiddenInputs,
        (
            *_with_baselines(
                calls.linear_policy_loss, _linear_policy_loss, eager.eager_linear_policy_loss
            ),
            _on_kept_ids(calls.linear_policy_loss, _linear_policy_loss),
            peers.LIGER_LINEAR_GRPO,
            *(
                with_gradients(peer, "loss in eager PyTorch", policy=True)
                for peer in (peers.TRL_CHUNKED, peers.CCE, peers.CCE_EXACT, peers.LIGER_SCALED_CE)
            ),
            peers.LIGER_MEAN_CE,
        ),
        gradients=True,
        masked=True,
        weight=12,
    ),
    KernelCase(
        "linear_token_logprobs",
        "log-probabilities and entropy from hidden states, no gradient",
        HiddenInputs,
        (
            *_ON_HIDDEN,
            _on_kept_ids(calls.on_hidden, r1_kernels.linear_token_logprobs),
            peers.TRL_CHUNKED,
            peers.CCE_FORWARD,
            peers.LIGER_SCALED_CE,
            peers.LIGER_CE,
        ),
        weight=3,
    ),
    KernelCase(
        "linear_token_logprobs+backward",
        "log-probabilities and entropy from hidden states, forward and backward",
        HiddenInputs,
        (
            *map(with_gradients, _ON_HIDDEN),
            with_gradients(peers.TRL_CHUNKED),
            with_gradients(peers.CCE),
            with_gradients(peers.CCE_EXACT),
            with_gradients(peers.LIGER_SCALED_CE),
            with_gradients(peers.LIGER_CE),
        ),
        gradients=True,
        weight=4,
    ),
    KernelCase(
        "token_logprobs",
        "log-probabilities and entropy from logits, no gradient",
        LogitsInputs,
        (*_ON_LOGITS, peers.TRL_LOGITS, peers.MEGATRON, peers.LIGER_SELECTIVE),
        weight=2,
    ),
    KernelCase(
        "token_logprobs+backward",
        "log-probabilities and entropy from logits, forward and backward into the logits",
        LogitsInputs,
        (
            *map(with_gradients, (_IN_PLACE, _KEPT, *_ON_LOGITS[1:], peers.TRL_LOGITS)),
            with_gradients(peers.MEGATRON, "gradient in bfloat16"),
            peers.LIGER_TRITON_GRPO,
        ),
        gradients=True,
        weight=3,
    ),
    KernelCase(
        "policy_loss",
        "policy loss from log-probabilities, forward and backward",
        PolicyInputs,
        _with_baselines(
            calls.policy_loss, _policy_loss, eager.eager_policy_loss, "no ratio, clip or KL out"
        ),
        gradients=True,
    ),
    KernelCase(
        "quantize_blockwise",
        "a matrix to fp8 with a scale for each 128 x 128 block (DeepGEMM's definition)",
        MatrixInputs,
        _with_baselines(calls.quantize, r1_kernels.quantize_blockwise, eager.eager_quantize),
    ),
    KernelCase(
        "dequantize_blockwise",
        "and back",
        MatrixInputs,
        _with_baselines(calls.dequantize, r1_kernels.dequantize_blockwise, eager.eager_dequantize),
    ),
)


def alone(kernel: Kernel) -> KernelCase:
    """Return the table of a kernel by itself, on its first example."""
    backend = "triton" if torch.cuda.is_available() else "torch"
    own_function, eager_function = (
        getattr(load_primitives(b), kernel.name) for b in (backend, "torch")
    )
    inputs = partial(ExampleInputs, kernel)
    return KernelCase(
        kernel.name,
        kernel.computes,
        inputs,
        _with_baselines(calls.primitive, own_function, eager_function),
    )


CASES = (
    *_FUNCTIONS,
    *(alone(k) for k in KERNELS if k.measured_in not in {case.name for case in _FUNCTIONS}),
)
BY_NAME = {case.name: case for case in CASES}
