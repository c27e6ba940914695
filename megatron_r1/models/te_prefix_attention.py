"""Attention to shared prefixes by Transformer Engine.

Transformer Engine's attention of packed batches has no mask of a tree. It has sequences with more
keys than queries, each causal from its last query on (`padding_causal_bottom_right`, all backends),
so the keys and values of a segment's whole sequence are gathered
(`shared_prefixes.whole_sequences`) and queries stay as they are: everything but attention is
computed once, and attention reads and saves as many keys as without sharing. With context
parallelism Transformer Engine refuses that mask (2.20: attention/dot_product_attention/utils.py,
`get_attention_backend`)."""

from enum import Enum
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_r1.models.shared_prefixes import whole_sequences_of


class _Mask(Enum):
    """Transformer Engine's name, which Megatron's AttnMaskType lacks."""

    padding_causal_bottom_right = 1


class SharedPrefixAttention(TEDotProductAttention):
    """Transformer Engine's attention in Megatron, also where segments continue others."""

    def __init__(self, *args: Any, **kwargs: Any):
        # As it does for keys that it takes from a cache: with "self" the plain products would mask
        # the padding of keys by the lengths of queries.
        super().__init__(*args, **kwargs | {"attention_type": "cross"})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Enum,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend causally within each segment and to all that is before it. Arguments and result
        are those of Megatron's class."""
        assert packed_seq_params is not None, "the trainer packs every batch"
        sequences = whole_sequences_of(packed_seq_params.cu_seqlens_q)
        if sequences is not None:
            packed_seq_params = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=packed_seq_params.cu_seqlens_q,
                cu_seqlens_kv=sequences.cu_seqlens,
                max_seqlen_q=packed_seq_params.max_seqlen_q,
                max_seqlen_kv=sequences.longest,
            )
            key, value = key[sequences.rows], value[sequences.rows]
            attn_mask_type = _Mask.padding_causal_bottom_right
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias,
            packed_seq_params,
            num_splits,
        )
