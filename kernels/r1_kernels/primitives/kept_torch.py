"""Softmax statistics of the tokens that a sampler kept, and their gradient, in PyTorch.

Formulae: `rows_triton`, with the sums over the kept ids alone. Only their logits are read: a few
dozen of a vocabulary, so that there is less to compute than without a cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1_kernels.precision import accumulation_dtype
from r1_kernels.sampling_mask import KeptIds
from r1_kernels.vocabulary import STATISTICS, RowUpstream, VocabShard


class _ShardIds(NamedTuple):
    """The kept ids among a shard's columns, each (n,) int64, row by row.

    Attributes:
        places: where in `KeptIds.token_ids` they are; a slice where they follow each other.
        rows: the row of each.
        columns: the shard's column of each.
        lengths: (T,) how many each row has."""

    places: slice | Tensor
    rows: Tensor
    columns: Tensor
    lengths: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Return sums of (n, …) values over each row, (T, …)."""
        # In fp64: it adds one value after the other, so that fp32 would lose digits of long rows.
        sums = torch.segment_reduce(values.double(), "sum", lengths=self.lengths, initial=0)
        return sums.to(values.dtype)


def kept_statistics(
    logits: Tensor, targets: Tensor, shard: VocabShard, scale: float, kept_ids: KeptIds
) -> Tensor:
    """Compute this shard's part of each row's softmax over its kept tokens.

    Args:
        logits: (T, V_local) float, any strides.
        targets: (T,) integers, ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        kept_ids: the kept ids of the T rows.

    Returns:
        (4, T) fp32 (fp64 for fp64 logits), `vocabulary.STATISTICS`; the logit of a target that was
        not kept is NaN."""
    ids = _shard_ids(kept_ids, shard)
    z = _gathered_logits(logits, ids.rows, ids.columns).to(accumulation_dtype(logits.dtype))
    peak = torch.segment_reduce(z, "max", lengths=ids.lengths, initial=float("-inf"))
    x = _below_peak(z, peak, ids.rows, scale)
    e = x.exp()
    # -inf · 0 counts as 0, its limit; e is 0 long before x reaches -1000.
    total, moment = ids.sums(torch.stack([e, x.clamp(min=-1000.0) * e], 1)).unbind(1)
    local_targets = targets - shard.first_column
    in_shard = (local_targets >= 0) & (local_targets < shard.num_real)
    # NaN unless it was kept.
    target_logit = torch.where(in_shard, torch.full_like(peak, torch.nan), 0.0)
    hits = (ids.columns == local_targets[ids.rows]).nonzero()[:, 0]
    target_logit[ids.rows[hits]] = z[hits]
    out = (peak, total, moment, target_logit)
    assert len(out) == len(STATISTICS)
    return torch.stack(out)


def kept_gradient(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    upstream: RowUpstream,
    kept_ids: KeptIds,
) -> Tensor:
    """Compute the gradient of the logits of the kept tokens.

    Rows whose two upstream gradients are 0 get 0.

    Args:
        logits: (T, V_local) float, any strides.
        targets: (T,) integers, ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        upstream: parts of the softmax and the upstream gradients, each (T,) fp32 (fp64 for fp64
            logits).
        kept_ids: the kept ids of the T rows.

    Returns:
        (N,) fp32 (fp64 for fp64 logits), one for each of `kept_ids.token_ids` that is in these rows
        and in this shard; the others are not defined."""
    entropy, peak, log_total, grad_logprobs, grad_entropy = upstream
    ids = _shard_ids(kept_ids, shard)
    z = _gathered_logits(logits, ids.rows, ids.columns).to(peak.dtype)
    log_p = _below_peak(z, peak, ids.rows, scale) - log_total[ids.rows]
    grad = grad_logprobs * scale
    has_gradient = grad != 0
    factor = -grad[ids.rows]
    if grad_entropy is not None:
        # d H / d z = -c p (log p + H)
        slope = grad_entropy * scale
        has_gradient = has_gradient | (slope != 0)
        factor = factor - slope[ids.rows] * (log_p.clamp(min=-1000.0) + entropy[ids.rows])
    d = log_p.exp_().mul_(factor)
    hits = (ids.columns == (targets - shard.first_column)[ids.rows]).nonzero()[:, 0]
    d[hits] += grad[ids.rows[hits]]
    if not has_gradient.all():
        d[~has_gradient[ids.rows]] = 0.0
    values = d.new_empty(len(kept_ids.token_ids))
    values[ids.places] = d
    return values


def kept_scatter(values: Tensor, shard: VocabShard, kept_ids: KeptIds, out: Tensor) -> Tensor:
    """Write the kept tokens' values, and 0 to all other columns, to `out`; return `out`.

    Args:
        values: (N,) float, one for each of `kept_ids.token_ids`; those outside these rows or this
            shard are not read.
        shard: the part of the vocabulary that the columns are.
        kept_ids: the kept ids of the T rows.
        out: (T, V_local) float."""
    ids = _shard_ids(kept_ids, shard)
    out.zero_()
    out[ids.rows, ids.columns] = values[ids.places].to(out.dtype)
    return out


def _shard_ids(kept_ids: KeptIds, shard: VocabShard) -> _ShardIds:
    """Return the kept ids of the shard."""
    lengths = kept_ids.ends - kept_ids.starts
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    places: slice | Tensor = slice(0, 0)
    if len(rows):
        first = int(kept_ids.starts[0])
        places = slice(first, first + len(rows))
        if int(kept_ids.ends[-1]) != places.stop:  # rows in between are left out
            row_offsets = lengths.cumsum(0) - lengths
            places = (
                torch.arange(len(rows), device=lengths.device)
                + (kept_ids.starts - row_offsets)[rows]
            )
    columns = kept_ids.token_ids[places].to(torch.int64) - shard.first_column
    if shard.group is not None or shard.num_real < shard.vocab_size:
        indices = ((columns >= 0) & (columns < shard.num_real)).nonzero()[:, 0]
        places = indices + places.start if isinstance(places, slice) else places[indices]
        rows, columns = rows[indices], columns[indices]
        lengths = rows.bincount(minlength=len(lengths))
    return _ShardIds(places, rows, columns, lengths)


def _gathered_logits(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return logits[rows, columns], (n,)."""
    if not logits.is_contiguous():
        return logits[rows, columns]
    return logits.view(-1).index_select(0, rows * logits.shape[1] + columns)


def _below_peak(z: Tensor, peak: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return (z - peak) · scale; in a row of only -inf, subtract 0."""
    return (z - torch.where(torch.isneginf(peak), 0.0, peak)[rows]) * scale
