"""The public functions with the same signatures, in plain PyTorch on any device.

Machines without a GPU train with them, and the Triton kernels are compared with them. Both backends
run the same chunked algorithms; fp64 autograd is the oracle of both (tests/kernels)."""

from functools import partial, update_wrapper

from r1_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from r1_kernels.linear_policy_loss import LinearPolicyLoss as LinearPolicyLoss
from r1_kernels.linear_policy_loss import linear_policy_loss
from r1_kernels.linear_token_logprobs import linear_token_logprobs
from r1_kernels.policy_loss import PolicyLoss as PolicyLoss
from r1_kernels.policy_loss import policy_loss
from r1_kernels.token_logprobs import token_logprobs


def _plain(function):
    return update_wrapper(partial(function, backend="torch"), function)


linear_policy_loss = _plain(linear_policy_loss)
linear_token_logprobs = _plain(linear_token_logprobs)
token_logprobs = _plain(token_logprobs)
policy_loss = _plain(policy_loss)
quantize_blockwise = _plain(quantize_blockwise)
dequantize_blockwise = _plain(dequantize_blockwise)
