"""Rotary angles of a packed batch, gathered at once.

Megatron slices them sample by sample, in Python, for queries and keys of every layer
(models/common/embeddings/rope_utils.py:151, Megatron-Core 0.16.1): with 256 samples a third of what
a small model's layer does besides its products, and on a GPU a wait for the device each time.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context import held_positions


def sample_positions(borders: Tensor, rank: int = 0, ranks: int = 1) -> Tensor:
    """Of each token that a context-parallel rank holds, its position in its own sample (T / ranks,)
    int64. borders: (S + 1,) integers from 0 to T, of the whole batch."""
    borders = borders.long()
    total = int(borders[-1])
    starts = borders[:-1].repeat_interleave(borders.diff(), output_size=total)
    if ranks == 1:
        return torch.arange(total, device=borders.device) - starts
    held = held_positions(borders, rank, ranks)
    return held - starts[held]


def rotate_packed(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args, cp_group: ProcessGroup, **kwargs
) -> Tensor:
    """t: (T, h, d) of a packed batch, rotated by the angles freqs (longest sample, 1, 1, d).

    The rest: as of Megatron's function of this place."""
    places = sample_positions(cu_seqlens, cp_group.rank(), cp_group.size())
    angles = freqs[places]
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], angles, *args, **kwargs)[:, 0]


def gather_angles_at_once() -> None:
    """Put `rotate_packed` in the place of Megatron's. Safe to call again."""
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed
