"""Rolls the tokens of a packed batch, which MTP layers predict, all at once instead of sample by
sample; `patches` puts `roll_packed` in the place of Megatron's function."""

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from torch import Tensor
from torch.distributed import ProcessGroup


def roll_packed(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every value one token to the left within its sample.

    Megatron's _roll_tensor_packed_seq, which this replaces, loops over the samples in Python and
    reads their borders from the device. It still does the work for a micro-batch that has no
    `HostPackedSeqParams.next_token_index`.

    Args:
        tensor: (..., T), any dtype.
        shifts: -1, as Megatron calls it.
        dims: -1, the tokens' dimension.
        packed_seq_params: those of the micro-batch.
        cp_group: the context-parallel ranks; None: one rank has all tokens.

    Returns:
        The moved values, (..., T), with 0 at the last token of every sample, and their sum, ()."""
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
