"""The softmax of one block of rows whose vocabulary is spread over a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def shard_range(columns: int, group: ProcessGroup | None) -> int:
    """First vocabulary id of this rank's equal, contiguous shard of `columns` columns."""
    return columns * (dist.get_rank(group) if group is not None else 0)


def hide_padding(logits: Tensor, first: int, vocab_size: int | None) -> None:
    """Give the columns that only pad the vocabulary (id >= vocab_size) no probability, in place."""
    if vocab_size is not None and first + logits.shape[-1] > vocab_size:
        logits[..., max(0, vocab_size - first) :] = float("-inf")


def softmax_statistics(
    logits: Tensor, targets: Tensor, first: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), entropy and log-sum-exp of each row, over the whole vocabulary of the group.

    logits: (T, V_local) fp32, columns `first` … of the vocabulary; targets: (T,) global ids.
    Returns three (T,) fp32. Collectives over the group: one maximum of T, one sum of 3 T.
    """
    peak = logits.amax(-1)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    # A row of -inf only has no softmax: 0 as its peak gives log 0 = -inf instead of NaN.
    peak = torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
    shifted = logits - peak[:, None]
    weight = torch.exp(shifted)
    local = targets - first
    here = (local >= 0) & (local < logits.shape[-1])
    chosen = shifted.gather(-1, torch.where(here, local, torch.zeros_like(local))[:, None])[:, 0]
    # 0 · (-inf) counts as 0, as its limit does.
    moment = (weight * torch.nan_to_num(shifted, neginf=0.0)).sum(-1)
    sums = torch.stack(
        [weight.sum(-1), moment, torch.where(here, chosen, torch.zeros_like(chosen))]
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, moment, chosen = sums
    log_total = total.log()
    return chosen - log_total, log_total - moment / total, peak + log_total
