"""Rotates the heads of a packed batch all at once instead of sample by sample; `patches` puts
`rotate_packed` in the place of Megatron's function.

Megatron slices the rotary angles of a packed batch sample by sample, in Python, for queries and
keys of every layer: with 256 samples that is a third of a small model's time besides its products,
and on a GPU a synchronization each time. Here all angles are gathered in one operation, at the
positions that `host_packed_seq_params` has for the whole micro-batch."""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context_parallel import positions_of_rank
from megatron_r1.models.host_packed_seq_params import marked_positions
from megatron_r1.models.shared_prefixes import marked_prefixes


def sample_positions(cu_seqlens: Tensor, rank: int = 0, num_ranks: int = 1) -> Tensor:
    """Return the position in its sample of each token that a context-parallel rank holds, (T /
    num_ranks,) int64.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T, the borders of the whole batch's samples, which
            may be marked by `shared_prefixes.mark_prefixes`.
        rank: the rank in the context-parallel group.
        num_ranks: the number of ranks of that group."""
    prefixes, cu_seqlens = marked_prefixes(cu_seqlens), cu_seqlens.long()
    total = int(cu_seqlens[-1])
    # output_size: without it the host would wait for the GPU's sum once more.
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    if prefixes is not None:
        starts = starts - prefixes.start.repeat_interleave(cu_seqlens.diff(), output_size=total)
    if num_ranks == 1:
        return torch.arange(total, device=cu_seqlens.device) - starts
    local_positions = positions_of_rank(cu_seqlens, rank, num_ranks)
    return local_positions - starts[local_positions]


def rotate_packed(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, cp_group: ProcessGroup, **kwargs: Any
) -> Tensor:
    """Rotate the heads of a packed batch by the angles of their positions.

    Args:
        t: (T, h, d), queries or keys.
        cu_seqlens: (samples + 1,), the borders of the samples.
        freqs: (longest sample, 1, 1, d), the angles in radians.
        *args: those of Megatron's _apply_rotary_pos_emb_thd.
        cp_group: the context-parallel ranks.
        **kwargs: those of Megatron's function.

    Returns:
        (T, h, d)."""
    positions = marked_positions(cu_seqlens)
    if positions is None:
        positions = sample_positions(cu_seqlens, cp_group.rank(), cp_group.size())
    angles = freqs[positions]
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], angles, *args, **kwargs)[:, 0]
