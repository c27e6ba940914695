"""Loss-head and FP8 kernels for reinforcement learning of language models.

Needs torch, and triton for CUDA tensors; nothing else. Every function takes `backend`: None runs
Triton kernels on CUDA tensors and plain PyTorch elsewhere; `r1_kernels.reference` has the same
functions bound to plain PyTorch on any device.

A call of `linear_policy_loss`, which uses the most, passes these modules in this order, once
`linear_policy_loss` has made its keywords into objects:

1. `arguments`: checks shapes, dtypes, devices and values.
2. `linear_token_logprobs`: `make_head` checks those of the head.
3. `registry`: chooses Triton or PyTorch for every primitive.
4. `policy_loss`: checks the tokens; `averaging` makes their mask into a weight per token.
5. `linear_head`: the logits of a chunk of tokens, by the matrix products of `precision`.
6. `primitives.softmax_*`: the statistics of each row of logits.
7. `vocabulary`: gathers them over the ranks that share the vocabulary.
8. `primitives.policy_*`: the loss of each token and its derivative (formulae: `policy_terms`).
9. `primitives.softmax_*`: the gradient of the logits, from which `linear_head` adds up those of
   hidden states and weight.
10. `fused_policy_loss`: sums the loss; its backward pass multiplies the gradients.

`linear_token_logprobs` passes 1 to 3 and 5 to 7, and in its backward pass 5 and 9;
`token_logprobs` does without `make_head` and 5, and `policy_loss` passes 1, 3, 4 and 8. `blockwise`
needs `arguments`, `registry` and `primitives.blockwise_*` alone."""

from r1_kernels import reference
from r1_kernels.averaging import Averaging
from r1_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from r1_kernels.fused_policy_loss import LinearPolicyLoss, linear_policy_loss_from_settings
from r1_kernels.linear_policy_loss import linear_policy_loss
from r1_kernels.linear_token_logprobs import linear_token_logprobs
from r1_kernels.policy_loss import PolicyLoss, policy_loss
from r1_kernels.policy_terms import PolicySettings, TokenTensors
from r1_kernels.sampling_mask import SamplingMask
from r1_kernels.token_logprobs import token_logprobs

__all__ = [
    "Averaging",
    "LinearPolicyLoss",
    "PolicyLoss",
    "PolicySettings",
    "SamplingMask",
    "TokenTensors",
    "dequantize_blockwise",
    "linear_policy_loss",
    "linear_policy_loss_from_settings",
    "linear_token_logprobs",
    "policy_loss",
    "quantize_blockwise",
    "reference",
    "token_logprobs",
]
