"""Positions and borders of a packed micro-batch, computed on the host for Megatron's layers.

Megatron works positions and borders of samples out from `cu_seqlens`, a tensor of the device, in
every layer, and the host waits for the device each time. Here they are computed once per
micro-batch, on the host, where it is packed.

Shapes: T tokens of a context rank's part."""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_POSITIONS = "sample_positions"


@dataclass
class HostPackedSeqParams(PackedSeqParams):
    """Megatron's parameters of a packed micro-batch, with what MTP layers need.

    Attributes:
        next_token_index: (T,) int64, where the token after each is among the tokens of all context
            ranks, gathered rank after rank; -1 after a sample's last token. None: not computed.
        mtp_target_rows: for MTP layer k, from 0, the positions whose target, the token k + 2
            behind, is a response token, int64; empty: not computed."""

    next_token_index: Tensor | None = None
    mtp_target_rows: tuple[Tensor, ...] = ()


def mark_positions(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """Return `cu_seqlens` marked with the position in its sample of each token of this rank.

    The mark is on the tensor object, because of all arguments only `cu_seqlens` reaches Megatron's
    rotary embedding.

    Args:
        cu_seqlens: (S + 1,) integers, the borders of the samples.
        positions: (T,) int64, on the device of what is rotated."""
    setattr(cu_seqlens, _POSITIONS, positions)
    return cu_seqlens


def marked_positions(cu_seqlens: Tensor) -> Tensor | None:
    """Return the mark of `mark_positions`, or None."""
    return getattr(cu_seqlens, _POSITIONS, None)
