"""The eager baseline of every kernel: straightforward PyTorch, with softmax and loss in fp32 and
the entropy without gradient.

Under torch.compile the same functions are the second baseline of each table."""

import torch
from torch import Tensor

CLIP = 10.0  # R1's
KL_BETA = 0.001  # R1's
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-4  # DeepGEMM's per_block_cast_to_fp8


def eager_token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the targets and the entropies, each (T,) fp32.

    Args:
        logits: (T, V).
        targets: (T,) ids."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def eager_linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` of hidden (T, H) and weight (V, H).

    Args:
        hidden: (T, H).
        weight: (V, H).
        targets: (T,) ids."""
    return eager_token_logprobs(hidden @ weight.t(), targets)


def eager_policy_loss(
    logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Return DeepSeekMath equation 3 with the k3 estimator of equation 4, averaged over masked
    tokens.

    Args:
        logprobs: (T,), the policy's.
        old: (T,), those of the policy that sampled.
        ref: (T,), the reference's.
        advantages: (T,) float.
        mask: (T,) float, 1 for a token that counts.

    Returns:
        A scalar."""
    ratio = (logprobs - old).exp()
    clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
    return ((KL_BETA * kl - surrogate) * mask).sum() / mask.sum()


def eager_linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `eager_policy_loss` from hidden states, with log-probabilities and entropies.

    Args:
        hidden: (T, H).
        weight: (V, H).
        targets: (T,) ids.
        *tokens: the arguments of `eager_policy_loss` after the first, each (T,).

    Returns:
        A scalar, and (T,) fp32 twice."""
    logprobs, entropy = eager_linear_token_logprobs(hidden, weight, targets)
    return eager_policy_loss(logprobs, *tokens), logprobs, entropy


def eager_quantize(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return FP8 codes and the scale of each square block, its largest magnitude / 448.

    Args:
        x: (M, N).
        block: rows and columns of a block.

    Returns:
        x / scale, (M, N) e4m3; scales, (ceil(M / block), ceil(N / block)) fp32."""
    rows, columns = x.shape
    tiles = torch.nn.functional.pad(x.float(), (0, -columns % block, 0, -rows % block))
    tiles = tiles.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (M/b, b, N/b, b)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=SMALLEST_AMAX) / FP8_MAX
    quantized_values = (tiles / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return quantized_values.to(torch.float8_e4m3fn).contiguous(), scale[:, 0, :, 0].contiguous()


def eager_dequantize(
    quantized: Tensor, scale: Tensor, dtype: torch.dtype, block: int = 128
) -> Tensor:
    """Return each FP8 code times its block's scale.

    Args:
        quantized: (M, N) e4m3.
        scale: (ceil(M / block), ceil(N / block)) fp32.
        dtype: the result's.
        block: rows and columns of a block.

    Returns:
        (M, N)."""
    rows, columns = quantized.shape
    spread_scale = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (quantized.float() * spread_scale).to(dtype)
