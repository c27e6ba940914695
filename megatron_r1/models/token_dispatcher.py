"""Megatron's all-to-all of tokens to experts, which does not wait for the device where the host
knows how many tokens go where.

The sizes of what is sent and received are arguments of NCCL, so the host has to know them. Megatron
counts tokens on the device and waits for the counts in every layer of experts. They are known
before in two cases: when a layer is recomputed, they are those of its forward pass; and when the
engine's choices are replayed for every token, they are counted where the micro-batch is packed and
exchanged once per rollout (`models.routing_replay`).

Shapes: n = e t ranks share the E experts: e ranks have different experts, l each, and t ranks
different parts of the same experts' matrices."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_r1.models import platform


class TokenCounts(NamedTuple):
    """Token counts that the host needs to dispatch one layer's pass over a micro-batch.

    Attributes:
        sent: (e,) tokens to the ranks of other experts; None on one rank.
        received: (e,) tokens from them; None on one rank.
        gathered: (t,) tokens of the ranks that share this rank's experts; None on one rank.
        per_expert: (l,) int64 on the host.
        chunks: (n, l) int64, tokens from each rank for each expert here, on the device where
            permutation is fused, else on the host; None with one expert here.
        num_out: tokens times experts chosen for each."""

    sent: Any
    received: Any
    gathered: Any
    per_expert: Tensor
    chunks: Tensor | None
    num_out: int | Tensor


class CountsSource(Protocol):
    """Knows the counts of a pass in progress, or keeps them for its recomputation."""

    def known_counts(self) -> TokenCounts | None:
        """Return the counts of the pass in progress; None: the device has them."""

    def keep_counts(self, counts: TokenCounts) -> None:
        """Take the counts of the pass in progress, once the host has them."""


class KnownCountsDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher, given counts by `source` where that has some."""

    source: CountsSource | None = None
    _counts: TokenCounts | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Return the tokens of each expert here, (l,) int64, for a routing_map (T, E) bool."""
        self._counts = counts = self.source.known_counts() if self.source else None
        if counts is None:
            return super().preprocess(routing_map)
        self.cuda_sync_point = "no_sync"  # the next pass without counts sets it again
        self.num_out_tokens = counts.num_out
        self.input_splits, self.output_splits = counts.sent, counts.received
        self.output_splits_tp = counts.gathered
        if counts.chunks is not None:
            self.num_global_tokens_per_local_expert = counts.chunks
        return counts.per_expert

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor | None:
        """Copy counts to the host and wait for them at their points, if they are not known."""
        if self._counts is not None:
            return tokens_per_expert
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_finish" and self.source is not None and not self.drop_and_pad:
            assert tokens_per_expert is not None, "Megatron's dispatcher has counted them"
            chunks = self.num_global_tokens_per_local_expert if self.num_local_experts > 1 else None
            splits = self.input_splits, self.output_splits, self.output_splits_tp
            self.source.keep_counts(
                TokenCounts(*splits, tokens_per_expert, chunks, self.num_out_tokens)
            )
        return tokens_per_expert


def indices_to_multihot(manager: Any, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return which experts each token that DeepEP brought is for, (T, l) bool, and its weights
    (T, l) fp32. In Megatron's, which selects by masks, the host waits five times.

    Args:
        manager: Megatron's _DeepepManager.
        indices: (T, topk) int64, experts of this rank; -1: another rank's.
        probs: (T, topk) float, the weights, with their gradients."""
    shape = (len(indices), manager.num_local_experts + 1)  # the last column is cut off
    places = torch.where(indices == -1, manager.num_local_experts, indices)
    multihot = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    weights = torch.zeros(shape, dtype=torch.float32, device=indices.device)
    multihot = multihot.scatter(1, places, True)
    weights = weights.scatter(1, places, probs.float())
    return multihot[:, :-1].contiguous(), weights[:, :-1].contiguous()


def exchange_token_counts(
    dispatcher: MoEAlltoAllTokenDispatcher, counts: Sequence[np.ndarray | None], num_layers: int
) -> list[list[TokenCounts] | None]:
    """Return what the host has to know of each micro-batch and layer; None for a micro-batch of
    which some rank of the group does not know its own counts.

    Every rank of the group calls it with as many micro-batches. The host waits for the device once.

    Args:
        dispatcher: the dispatcher of one of this rank's layers, for its groups and sizes.
        counts: this rank's tokens to each expert, (layers, E) integers per micro-batch; None: not
            known.
        num_layers: this rank's layers of experts."""
    num_experts, num_local = dispatcher.num_experts, dispatcher.num_local_experts
    shape = (len(counts), num_layers, num_experts)
    local_counts = np.full(shape, -1, np.int64)
    for batch, batch_counts in enumerate(counts):
        if batch_counts is not None:
            local_counts[batch] = batch_counts
    on_device = platform.to_device(torch.from_numpy(local_counts), platform.device())
    group = dispatcher.tp_ep_group
    gathered_counts = on_device.new_empty(group.size() * len(counts), *shape[1:])
    # Over the ranks that share the experts, which send tokens to each other: all have the same
    # layers, and each has other tokens.
    dist.all_gather_into_tensor(gathered_counts, on_device, group=group)
    # (micro-batches, layers, t, e, E), as the dispatcher orders its ranks
    ranks = (dispatcher.ep_size, dispatcher.tp_size, len(counts))
    by_rank = gathered_counts.unflatten(0, ranks).permute(2, 3, 1, 0, 4)
    first = dispatcher.local_expert_indices[0]
    local_experts = by_rank[..., first : first + num_local]
    chunks = local_experts.flatten(2, 3).contiguous()
    cpu_counts = by_rank.cpu().numpy()
    is_known = (cpu_counts >= 0).all((1, 2, 3, 4))
    on_cpu = cpu_counts[..., first : first + num_local]
    tokens = on_cpu.sum(-1)  # (micro-batches, layers, t, e)
    sent_counts = local_counts.reshape(*shape[:2], dispatcher.ep_size, num_local).sum(-1)
    if not dispatcher.config.moe_permute_fusion:
        chunks = torch.from_numpy(on_cpu.reshape(chunks.shape))
    is_single_rank = group.size() == 1

    def layer_counts(batch: int, layer: int) -> TokenCounts:
        rank_tokens = tokens[batch, layer]
        return TokenCounts(
            None if is_single_rank else sent_counts[batch, layer],
            None if is_single_rank else rank_tokens[dispatcher.tp_rank],
            None if is_single_rank else rank_tokens.sum(-1),
            torch.from_numpy(on_cpu[batch, layer].sum((0, 1))),
            chunks[batch, layer] if num_local > 1 else None,
            int(local_counts[batch, layer].sum()),
        )

    return [
        [layer_counts(batch, layer) for layer in range(num_layers)] if is_known[batch] else None
        for batch in range(len(counts))
    ]
