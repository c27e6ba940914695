"""Plain-PyTorch definitions of every kernel; also what a machine without a GPU trains with."""

from r1_kernels.reference.linear_token_logprobs import linear_token_logprobs
from r1_kernels.reference.policy_loss import PolicyLoss, policy_loss
from r1_kernels.reference.token_logprobs import token_logprobs

__all__ = ["PolicyLoss", "linear_token_logprobs", "policy_loss", "token_logprobs"]
