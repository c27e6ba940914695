"""The memory that a model takes whose layers are read one by one, and how it is spent."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.token_logprobs import BYTES_PER_LOGIT, LOGITS_AT_ONCE, TOKENS_AT_ONCE

LAYER_BYTES, OUTER_BYTES = 6, 8
"""Bytes a parameter while it is read, of a layer and of embedding and head: fp32, and the newest
tensor as it is stored, of a layer a part of it."""
NUM_ACTIVATIONS = 12
"""Activations of a layer that are in memory at once, fp32, each as wide as its widest."""


class StreamMemory(NamedTuple):
    """How a model whose layers are read one by one spends memory.

    Attributes:
        kept_bytes: the most of hidden states and masks that one reading of the layers is for.
        logit_tokens: tokens whose logits are there at once.
        reads_experts: whether experts are read one by one too, each batch anew."""

    kept_bytes: int
    logit_tokens: int
    reads_experts: bool


def stream_memory(skeleton: Any, free_bytes: int, longest: int) -> StreamMemory:
    """Return how a model is streamed.

    Args:
        skeleton: transformers' model without weights.
        free_bytes: the memory that it may take.
        longest: tokens of the longest sequence.

    Raises:
        CannotRecompute: not even one layer fits, or its experts one by one."""
    config = skeleton.config
    largest_layer, layer_with_one_expert = _layer_sizes(skeleton)
    outer_values = config.vocab_size * config.hidden_size
    tokens = max(longest, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // config.vocab_size))
    widths = [getattr(config, name, None) or 0 for name in ("intermediate_size", "hidden_size")]
    activations = 4 * NUM_ACTIVATIONS * max(widths) * tokens
    min_bytes = 4 * config.hidden_size * tokens + BYTES_PER_LOGIT * config.vocab_size
    for layer, reads_experts in ((largest_layer, False), (layer_with_one_expert, True)):
        num_bytes = max(LAYER_BYTES * layer, OUTER_BYTES * outer_values) + activations
        if num_bytes + 2 * min_bytes <= free_bytes:
            half = (free_bytes - num_bytes) // 2
            return StreamMemory(half, half // (BYTES_PER_LOGIT * config.vocab_size), reads_experts)
    raise CannotRecompute(
        "the largest layer without its experts, or embedding or head, and the activations of "
        f"{tokens:,} tokens need {(num_bytes + 2 * min_bytes) / 1e9:,.1f} GB, "
        f"{free_bytes / 1e9:,.1f} GB are free"
    )


def _layer_sizes(skeleton: Any) -> tuple[int, int]:
    """Return the parameters of the largest layer, and of the largest with one of its experts."""
    sizes, single = [0], [0]
    for layer in skeleton.base_model.layers:
        tensors = dict(layer.named_parameters())
        experts = {name: tensors[name] for name in tensors if ".experts." in name}
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
        num_expert_values = sum(tensor.numel() for tensor in experts.values())
        num_single_values = sum(tensor.numel() // len(tensor) for tensor in experts.values())
        single.append(sizes[-1] - num_expert_values + num_single_values)
    return max(sizes), max(single)
