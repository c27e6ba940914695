"""What every implementation is compared with: every kernel in straightforward PyTorch (softmax and
loss in fp32, entropy without gradient), and the results in fp64, the reference of its error.

The eager functions under torch.compile are the second baseline of each table; the policy loss in
fp64 is also the reference of the errors. Log-probabilities are exact for every token. Gradients
are exact for a sample of rows, since all of them in fp64 would take four times the memory of what
is measured."""

from collections.abc import Callable

import torch
from torch import Tensor

CLIP = 10.0  # R1's
KL_BETA = 0.001  # R1's
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-4  # DeepGEMM's per_block_cast_to_fp8


def eager_token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (T, V), targets (T,) -> log-probabilities and entropies, each (T,) fp32."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def eager_linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` of hidden (T, H) and weight (V, H)."""
    return eager_token_logprobs(hidden @ weight.t(), targets)


def eager_policy_loss(
    logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """DeepSeekMath equation 3 with the k3 estimator of equation 4, averaged over masked tokens."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
    return ((KL_BETA * kl - surrogate) * mask).sum() / mask.sum()


def eager_linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = eager_linear_token_logprobs(hidden, weight, targets)
    return eager_policy_loss(logprobs, *tokens), logprobs, entropy


def eager_quantize(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """x (M, N) -> x / scale in float8_e4m3fn, and each square block's fp32 scale, amax / 448."""
    rows, columns = x.shape
    tiles = torch.nn.functional.pad(x.float(), (0, -columns % block, 0, -rows % block))
    tiles = tiles.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (M/b, b, N/b, b)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=SMALLEST_AMAX) / FP8_MAX
    quantized = (tiles / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scale[:, 0, :, 0].contiguous()


def eager_dequantize(
    quantized: Tensor, scale: Tensor, dtype: torch.dtype, block: int = 128
) -> Tensor:
    """Return each value of (M, N) times its block's scale."""
    rows, columns = quantized.shape
    spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (quantized.float() * spread).to(dtype)


SAMPLE = 256  # rows of a gradient that are checked
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}


def sample_rows(size: int, device: torch.device) -> Tensor:
    """Return SAMPLE indices below `size`, evenly spaced, both ends included."""
    return torch.linspace(0, size - 1, min(SAMPLE, size), device=device).round().long()


def row_chunks(tokens: int, vocab: int, device: torch.device) -> list[slice]:
    """Return slices of the tokens whose fp64 logits fit CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES[device.type] // (8 * vocab))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


@torch.no_grad()
def normalizers(
    logits_of: Callable[[slice], Tensor], targets: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Return log sum exp of every row and the targets' log-probabilities, each (T,) fp64.

    logits_of: returns the fp64 logits (n, V) of a slice of tokens."""
    sums, chosen = [], []
    for part in row_chunks(len(targets), vocab, targets.device):
        logits = logits_of(part)
        sums.append(logits.logsumexp(-1))
        chosen.append(logits.gather(-1, targets[part, None])[:, 0])
    return torch.cat(sums), torch.cat(chosen) - torch.cat(sums)


def policy_gradient(logprobs: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the policy loss and its gradient in the log-probabilities, (T,) fp64."""
    leaf = logprobs.detach().double().requires_grad_()
    loss = eager_policy_loss(leaf, *(t.double() for t in tokens))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@torch.no_grad()
def logits_gradient(logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor) -> Tensor:
    """Return d (upstream . logprobs) / d logits for fp64 logits (n, V); the others are (n,)."""
    gradient = (logits - lse[:, None]).exp_().mul_(-upstream[:, None])
    return gradient.scatter_add_(1, targets[:, None], upstream[:, None])


@torch.no_grad()
def weight_gradient(
    hidden: Tensor, weight: Tensor, columns: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor
) -> Tensor:
    """Return rows `columns` of d (upstream . logprobs) / d weight, (n, H) fp64, over all tokens."""
    chosen = weight[columns].double()
    total = torch.zeros_like(chosen)
    for part in row_chunks(len(targets), len(columns) + hidden.shape[1], hidden.device):
        rows = hidden[part].double()
        gradient = (rows @ chosen.t() - lse[part, None]).exp_().neg_()
        gradient += targets[part, None] == columns
        total += (gradient * upstream[part, None]).t() @ rows
    return total


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the error over that of the exact value."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def largest_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()
