"""Loss-head and FP8 kernels for reinforcement learning of language models.

Needs torch, and triton for CUDA tensors; nothing else. Every function takes `backend`: None runs
Triton kernels on CUDA tensors and plain PyTorch elsewhere; `r1_kernels.reference` has the same
functions bound to plain PyTorch on any device."""

from r1_kernels import reference
from r1_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from r1_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from r1_kernels.policy_loss import PolicyLoss, policy_loss
from r1_kernels.sampling_mask import SamplingMask
from r1_kernels.token_logprobs import linear_token_logprobs, token_logprobs

__all__ = [
    "LinearPolicyLoss",
    "PolicyLoss",
    "SamplingMask",
    "dequantize_blockwise",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "quantize_blockwise",
    "reference",
    "token_logprobs",
]
