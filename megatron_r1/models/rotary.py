"""Rotary position embedding of a packed batch with all angles gathered in one operation.

This replaces Megatron's function (`models.patches`), which slices the angles sample by sample, in
Python, for queries and keys of every layer: with 256 samples that is a third of a small model's
time besides its products, and on a GPU a synchronization each time."""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context import held_positions
from megatron_r1.models.prefixes import first_positions


def sample_positions(cu_seqlens: Tensor, rank: int = 0, num_ranks: int = 1) -> Tensor:
    """Return the position in its sample of each token that a context-parallel rank holds, (T /
    num_ranks,) int64. cu_seqlens: (S + 1,) integers from 0 to T, of the whole batch."""
    cu_seqlens = cu_seqlens.long()
    total = int(cu_seqlens[-1])
    # output_size: without it the host would wait for the GPU's sum once more.
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    if num_ranks == 1:
        return torch.arange(total, device=cu_seqlens.device) - starts
    held = held_positions(cu_seqlens, rank, num_ranks)
    return held - starts[held]


def rotate_packed(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, cp_group: ProcessGroup, **kwargs: Any
) -> Tensor:
    """Rotate t (T, h, d) of a packed batch by the angles freqs (longest sample, 1, 1, d).

    The other arguments are those of Megatron's _apply_rotary_pos_emb_thd."""
    positions = sample_positions(cu_seqlens, cp_group.rank(), cp_group.size())
    if (first := first_positions(cu_seqlens)) is not None:
        positions = positions + first.repeat_interleave(cu_seqlens.diff().long())
    angles = freqs[positions]
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], angles, *args, **kwargs)[:, 0]


def set_yarn(
    model: GPTModel,
    *,
    factor: float,
    rope_theta: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> None:
    """Scale the angles and embeddings of a model by YaRN (arXiv 2309.00071), before its first use:
    as transformers does, with whole dimensions as limits only if `truncate`."""
    rotary = model.rotary_pos_emb
    size = 2 * len(rotary.inv_freq)
    low, high = yarn_rotary_pos_embedding._yarn_find_correction_range(
        beta_fast, beta_slow, size, rope_theta, original_max_position_embeddings, truncate
    )
    scaled = yarn_rotary_pos_embedding._yarn_linear_ramp_mask(
        low, high, size // 2, rotary.inv_freq.device
    )
    rotary.inv_freq = rotary.inv_freq * (1 - scaled) + rotary.inv_freq / factor * scaled
    # Megatron's attention multiplies by 1 + ln(factor) / 10 where its configuration has this.
    model.config.yarn_rotary_scaling_factor = factor
