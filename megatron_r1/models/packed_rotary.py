"""Rotates the heads of a packed batch and rolls its tokens, all at once instead of sample by
sample: `patches` puts both in the place of Megatron's functions.

`rotate_packed`: Megatron slices the rotary angles of a packed batch sample by sample, in Python,
for queries and keys of every layer: with 256 samples that is a third of a small model's time
besides its products, and on a GPU a synchronization each time. Here all angles are gathered in one
operation, at the positions that `host_packed_seq_params` has for the whole micro-batch.
`roll_packed`: the same of MTP layers' tokens."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
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


def roll_packed(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tensor (..., T) with each token's value in the place before it, 0 at the end of
    every sample, and its sum.

    Megatron's _roll_tensor_packed_seq goes through the samples in Python and reads their borders
    from the device; without `HostPackedSeqParams.next_token_index` it is called.

    Args:
        tensor: (..., T), any dtype.
        shifts: -1, as Megatron calls it.
        dims: -1, the tokens' dimension.
        packed_seq_params: those of the micro-batch.
        cp_group: the context-parallel ranks; None: one rank has all tokens."""
    next_token_index = getattr(packed_seq_params, "next_token_index", None)
    if next_token_index is None:
        return _MEGATRONS_ROLL(tensor, shifts, dims, packed_seq_params, cp_group)
    all_tokens = tensor
    if cp_group is not None and cp_group.size() > 1:
        # Over context parallelism: the token behind a chunk's last one is on another rank.
        gathered_tensor = tensor.new_empty(cp_group.size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered_tensor, tensor.contiguous(), group=cp_group)
        all_tokens = gathered_tensor.unflatten(0, (cp_group.size(), -1)).movedim(0, -2).flatten(-2)
    rolled_tensor = all_tokens.index_select(-1, next_token_index.clamp(min=0)) * (
        next_token_index >= 0
    )
    return rolled_tensor, rolled_tensor.sum()


_MEGATRONS_ROLL = multi_token_prediction._roll_tensor_packed_seq
