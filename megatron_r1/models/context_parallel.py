"""The tokens of a packed batch that each rank of a context-parallel group holds.

A causal query late in a sample costs more than an early one, so each sample is cut into 2 n equal
chunks for n ranks, and rank r holds chunks r and 2 n - 1 - r (Transformer Engine's split): ranks
have equally many tokens and equal work. A rank's tokens are its two chunks of the first sample,
then those of the second, and so on: a packed batch whose cu_seqlens are the global ones divided by
the number of ranks.

Shapes: T tokens of the whole batch, S samples."""

import torch
from torch import Tensor


def positions_of_rank(cu_seqlens: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return the positions of the whole batch that `rank` holds, (T / num_ranks,) int64, in order.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        rank: the rank within the context-parallel group.
        num_ranks: the number of ranks of that group.

    Raises:
        ValueError: where num_ranks > 1 and a sample's length is not a multiple of 2 * num_ranks.
    """
    cu_seqlens = cu_seqlens.long()
    if num_ranks == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    lengths = cu_seqlens.diff()
    if (lengths % (2 * num_ranks)).any():
        raise ValueError(
            f"sample lengths {lengths.tolist()[:8]} must be multiples of {2 * num_ranks} to be "
            f"split over {num_ranks} context-parallel ranks: pad them"
        )
    chunk_lengths = lengths // (2 * num_ranks)
    first = cu_seqlens[:-1] + rank * chunk_lengths
    second = cu_seqlens[1:] - (rank + 1) * chunk_lengths
    starts = torch.stack([first, second], 1).flatten()
    return concat_ranges(starts, chunk_lengths.repeat_interleave(2))


def gathered_order(cu_seqlens: Tensor, num_ranks: int) -> Tensor:
    """Return the index, (T,) int64, that sorts tokens gathered rank after rank by samples.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        num_ranks: the number of ranks of the context-parallel group.
    """
    gathered_positions = torch.cat(
        [positions_of_rank(cu_seqlens, rank, num_ranks) for rank in range(num_ranks)]
    )
    order = torch.empty_like(gathered_positions)
    order[gathered_positions] = torch.arange(
        len(gathered_positions), device=gathered_positions.device
    )
    return order


def concat_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return start, start + 1, … start + length - 1 of each span, end to end, (Σ lengths,) int64.

    Args:
        starts: (N,) int64.
        lengths: (N,) int64."""
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = (starts - (ends - lengths)).repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift
