"""The results in fp64, by which every implementation's error is measured.

Log-probabilities are exact for every token. Gradients are exact for a sample of rows, since all of
them in fp64 would take four times the memory of what is measured."""

from collections.abc import Callable

import torch
from torch import Tensor

from r1_kernels_bench.eager import eager_policy_loss

SAMPLE = 256  # rows of a gradient that are checked
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}


def sample_rows(size: int, device: torch.device) -> Tensor:
    """Return SAMPLE indices below `size`, evenly spaced, both ends included."""
    return torch.linspace(0, size - 1, min(SAMPLE, size), device=device).round().long()


def row_chunks(tokens: int, vocab: int, device: torch.device) -> list[slice]:
    """Return slices of the tokens whose fp64 logits fit CHUNK_BYTES.

    Args:
        tokens: T.
        vocab: V.
        device: the device of the logits."""
    step = max(1, CHUNK_BYTES[device.type] // (8 * vocab))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


@torch.no_grad()
def normalizers(
    logits_of: Callable[[slice], Tensor], targets: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Return log sum exp of every row and the targets' log-probabilities, each (T,) fp64.

    Args:
        logits_of: returns the fp64 logits (n, V) of a slice of tokens.
        targets: (T,) ids.
        vocab: V."""
    sums, target_logits = [], []
    for part in row_chunks(len(targets), vocab, targets.device):
        logits = logits_of(part)
        sums.append(logits.logsumexp(-1))
        target_logits.append(logits.gather(-1, targets[part, None])[:, 0])
    return torch.cat(sums), torch.cat(target_logits) - torch.cat(sums)


def policy_gradient(logprobs: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the policy loss and its gradient in the log-probabilities, (T,) fp64."""
    leaf = logprobs.detach().double().requires_grad_()
    loss = eager_policy_loss(leaf, *(t.double() for t in tokens))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@torch.no_grad()
def logits_gradient(logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor) -> Tensor:
    """Return d (upstream . logprobs) / d logits, (n, V) fp64.

    Args:
        logits: (n, V) fp64.
        targets: (n,) int64.
        lse: (n,) fp64, log of the sum of each row's exponentials.
        upstream: (n,) fp64, the gradient of the log-probabilities."""
    gradient = (logits - lse[:, None]).exp_().mul_(-upstream[:, None])
    return gradient.scatter_add_(1, targets[:, None], upstream[:, None])


@torch.no_grad()
def weight_gradient(
    hidden: Tensor, weight: Tensor, columns: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor
) -> Tensor:
    """Return some rows of d (upstream . logprobs) / d weight, (n, H) fp64, over all tokens.

    Args:
        hidden: (T, H).
        weight: (V, H).
        columns: (n,), the ids whose rows are computed.
        targets: (T,) int64.
        lse: (T,) fp64, log of the sum of each token's exponentials.
        upstream: (T,) fp64, the gradient of the log-probabilities."""
    weight_rows = weight[columns].double()
    total = torch.zeros_like(weight_rows)
    for part in row_chunks(len(targets), len(columns) + hidden.shape[1], hidden.device):
        rows = hidden[part].double()
        gradient = (rows @ weight_rows.t() - lse[part, None]).exp_().neg_()
        gradient += targets[part, None] == columns
        total += (gradient * upstream[part, None]).t() @ rows
    return total


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the error over that of the exact value."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def largest_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()
