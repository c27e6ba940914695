"""The tables: each kernel with its inputs, its implementations and its share of the time."""

from __future__ import annotations

from dataclasses import dataclass

from tools.bench.kernels import ours, peer_liger, peers
from tools.bench.kernels.implementation import Implementation
from tools.bench.kernels.inputs import HiddenInputs, LogitsInputs, MatrixInputs, PolicyInputs


@dataclass(frozen=True)
class Case:
    """gradients, masked: what the bound counts. weight: about its share of the run's time."""

    name: str
    about: str
    inputs: type
    implementations: tuple[Implementation, ...]
    gradients: bool = False
    masked: bool = False
    weight: int = 1


CASES = (
    Case(
        "linear_policy_loss",
        "policy loss from hidden states, forward and backward",
        HiddenInputs,
        (
            *ours.LINEAR_POLICY_LOSS,
            peer_liger.LINEAR_GRPO,
            peers.TRL_CHUNKED.policy,
            peers.CCE.policy,
            peers.CCE_EXACT.policy,
            peer_liger.SCALED_CE.policy,
            peer_liger.LINEAR_MEAN_CE,
        ),
        gradients=True,
        masked=True,
        weight=12,
    ),
    Case(
        "linear_token_logprobs",
        "log-probabilities and entropy from hidden states, no gradient",
        HiddenInputs,
        (
            *ours.LINEAR_TOKEN_LOGPROBS,
            peers.TRL_CHUNKED.forward,
            peers.CCE_FORWARD,
            peer_liger.SCALED_CE.forward,
            peer_liger.LINEAR_CE.forward,
        ),
        weight=3,
    ),
    Case(
        "linear_token_logprobs+backward",
        "log-probabilities and entropy from hidden states, forward and backward",
        HiddenInputs,
        (
            *ours.LINEAR_TOKEN_LOGPROBS_BACKWARD,
            peers.TRL_CHUNKED.backward,
            peers.CCE.backward,
            peers.CCE_EXACT.backward,
            peer_liger.SCALED_CE.backward,
            peer_liger.LINEAR_CE.backward,
        ),
        gradients=True,
        weight=4,
    ),
    Case(
        "token_logprobs",
        "log-probabilities and entropy from logits, no gradient",
        LogitsInputs,
        (
            *ours.TOKEN_LOGPROBS,
            peers.TRL_LOGITS.forward,
            peers.MEGATRON.forward,
            peer_liger.SELECTIVE,
        ),
        weight=2,
    ),
    Case(
        "token_logprobs+backward",
        "log-probabilities and entropy from logits, forward and backward into the logits",
        LogitsInputs,
        (
            *ours.TOKEN_LOGPROBS_BACKWARD,
            peers.TRL_LOGITS.backward,
            peers.MEGATRON.backward,
            peer_liger.TRITON_GRPO,
        ),
        gradients=True,
        weight=3,
    ),
    Case(
        "policy_loss",
        "policy loss from log-probabilities, forward and backward",
        PolicyInputs,
        ours.POLICY_LOSS,
        gradients=True,
    ),
    Case(
        "quantize_blockwise",
        "a matrix to fp8 with a scale for each 128 x 128 block (DeepGEMM's definition)",
        MatrixInputs,
        ours.QUANTIZE,
    ),
    Case("dequantize_blockwise", "and back", MatrixInputs, ours.DEQUANTIZE),
)
BY_NAME = {case.name: case for case in CASES}
