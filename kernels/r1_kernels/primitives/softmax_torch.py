"""Softmax statistics of rows of logits, and the gradient of the logits, in PyTorch.

Formulae: `rows_triton`. A tile of rows at a time, so that intermediate results are small compared
with the logits, but large enough that starting the threads of each operation costs little, also on
a busy machine."""

import torch
from torch import Tensor

from r1_kernels.precision import accumulation_dtype
from r1_kernels.vocabulary import STATISTICS, RowUpstream, VocabShard

TILE_ELEMENTS = 1 << 20  # 4 MiB of fp32


def row_statistics(logits: Tensor, targets: Tensor, shard: VocabShard, scale: float) -> Tensor:
    """Compute this shard's part of each row's softmax, as `softmax_triton.row_statistics`.

    Args:
        logits: (T, V_local) float, any strides.
        targets: (T,) integers, ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.

    Returns:
        (4, T) fp32 (fp64 for fp64 logits), `vocabulary.STATISTICS`."""
    out = logits.new_empty(len(STATISTICS), len(logits), dtype=accumulation_dtype(logits.dtype))
    if not shard.num_real:
        out[0], out[1:] = float("-inf"), 0.0
        return out
    peak, total, moment, target_logit = out.unbind()
    tiles = _tile_starts(logits)
    # Allocated once: new memory for every tile costs more than the arithmetic on it.
    scratch = out.new_empty(2, min(len(logits), tiles.step), shard.num_real)
    for start in tiles:
        rows = slice(start, start + tiles.step)
        z = logits[rows, : shard.num_real].to(out.dtype)
        x, e = scratch[:, : len(z)]
        torch.amax(z, -1, out=peak[rows])
        _below_peak(z, peak[rows], scale, out=x)
        torch.exp(x, out=e)
        torch.sum(e, -1, out=total[rows])
        # -inf · 0 counts as 0, its limit; e is 0 long before x reaches -1000.
        torch.sum(x.clamp_(min=-1000.0).mul_(e), -1, out=moment[rows])
        local_targets = targets[rows] - shard.first_column
        in_shard = (local_targets >= 0) & (local_targets < shard.num_real)
        logit = z.gather(-1, torch.where(in_shard, local_targets, 0)[:, None])[:, 0]
        target_logit[rows] = torch.where(in_shard, logit, 0.0)
    return out


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    upstream: RowUpstream,
    out: Tensor,
) -> Tensor:
    """Write the gradient of the logits to `out`, as `softmax_triton.logits_gradient`; return it.

    Padding columns get 0, and so do rows whose two upstream gradients are 0.

    Args:
        logits: (T, V_local) float, any strides.
        targets: (T,) integers, ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        upstream: parts of the softmax and the upstream gradients, each (T,) fp32 (fp64 for fp64
            logits).
        out: (T, V_local) float; it may be `logits` itself."""
    entropy, peak, log_total, grad_logprobs, grad_entropy = upstream
    tiles = _tile_starts(logits)
    for start in tiles:
        rows = slice(start, start + tiles.step)
        grad = grad_logprobs[rows] * scale
        inverse_total = (-log_total[rows]).exp()
        z = logits[rows, : shard.num_real].to(peak.dtype)
        # `d` may share the memory of the logits: every step below is elementwise.
        d = out[rows, : shard.num_real] if out.dtype == peak.dtype else torch.empty_like(z)
        has_gradient = grad != 0
        if grad_entropy is None:
            _below_peak(z, peak[rows], scale, out=d)
            d.exp_().mul_((-grad * inverse_total)[:, None])
        else:
            # d H / d z = -c p (log p + H)
            slope = grad_entropy[rows] * scale
            has_gradient |= slope != 0
            flat = grad + slope * (entropy[rows] - log_total[rows])
            x = _below_peak(z, peak[rows], scale, out=torch.empty_like(z))
            e = x.exp()
            x.clamp_(min=-1000.0).mul_(slope[:, None]).add_(flat[:, None])
            torch.mul(x, e, out=d).mul_(-inverse_total[:, None])
        local_targets = targets[rows] - shard.first_column
        hits = ((local_targets >= 0) & (local_targets < shard.num_real)).nonzero()[:, 0]
        d[hits, local_targets[hits]] += grad[hits]
        if not has_gradient.all():
            d[~has_gradient] = 0.0
        if out.dtype != peak.dtype:
            out[rows, : shard.num_real] = d
        out[rows, shard.num_real :] = 0.0
    return out


def _below_peak(z: Tensor, peak: Tensor, scale: float, out: Tensor) -> Tensor:
    """Return out = (z - peak) · scale; in a row of only -inf, subtract 0."""
    base = torch.where(torch.isneginf(peak), 0.0, peak)
    torch.sub(z, base[:, None], out=out)
    return out if scale == 1.0 else out.mul_(scale)


def _tile_starts(logits: Tensor) -> range:
    """Return the first rows of the tiles, as a range whose step is the rows per tile."""
    return range(0, len(logits), max(1, TILE_ELEMENTS // max(1, logits.shape[-1])))
