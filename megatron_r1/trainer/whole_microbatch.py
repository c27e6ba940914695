"""The whole responses of a micro-batch, also where ranks of context parallelism hold parts of them.

A formula over the tokens of a response is computed on the gathered tensors, and each rank keeps
its part of the result. What the controller sent for a response is there its outcome advantage, on
each of its tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context_parallel import gathered_order, positions_of_rank
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.token_advantages import kl_penalized_rewards


class WholeMicrobatch:
    """The whole responses of one micro-batch, on every rank that holds a part of them.

    T is the number of tokens of the whole micro-batch, in sample order.

    Args:
        batch: the part of this rank.
        context_group: the ranks that hold the batch's other parts; None: there are none.

    Attributes:
        is_response: (T,) bool, the tokens that are trained on.
        token_outcome_advantages: (T,), on each token the `Sample.outcome_advantage` of its
            response: the reward, less the baseline of an algorithm that has one.
        last_response_positions: (T,) int64, the position of the last response token of each token's
            sample, or -1.
        counts_samples: whether this rank is the one of the group that counts whole samples."""

    def __init__(self, batch: PackedMicrobatch, context_group: ProcessGroup | None = None):
        self.batch, self._group = batch, context_group
        self._ranks = 1 if context_group is None else dist.get_world_size(context_group)
        self._rank = 0 if context_group is None else dist.get_rank(context_group)
        self.counts_samples = self._rank == 0
        self._cu_seqlens = batch.cu_seqlens.long() * self._ranks
        self.is_response = self.gather(batch.is_response.to(torch.uint8)).bool()
        self.token_outcome_advantages = self.gather(batch.outcome_advantages)
        lengths = self._cu_seqlens.diff()
        self._sample = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        self.last_response_positions = self._last_of_each()

    def _last_of_each(self) -> Tensor:
        ends = torch.full_like(self._cu_seqlens[1:], -1)
        position = torch.arange(len(self._sample), device=ends.device)
        response_positions = torch.where(self.is_response, position, -1)
        return ends.scatter_reduce(0, self._sample, response_positions, "amax")[self._sample]

    @property
    def rollout_log_ratios(self) -> Tensor:
        """(T,) fp64, nats: log(π_old / π_engine) of response tokens, 0 elsewhere."""
        old_logprobs = self.gather(self.batch.logprobs["old"]).double()
        log_ratios = old_logprobs - self.gather(self.batch.rollout_logprobs)
        return torch.where(self.is_response, log_ratios, 0.0)

    def sample_sums(self, values: Tensor) -> Tensor:
        """Return (S,) fp64, the sum of `values` (T,) over the response tokens of each sample."""
        response_values = torch.where(self.is_response, values.double(), 0.0)
        # No scatter: of equal tensors every tensor-parallel rank has to get the same bits.
        return torch.segment_reduce(response_values, "sum", offsets=self._cu_seqlens, initial=0)

    @property
    def response_lengths(self) -> Tensor:
        """(T,) fp64: the number of response tokens of each token's sample."""
        return self.sample_sums(torch.ones_like(self.is_response))[self._sample]

    def sample_means(self, values: Tensor) -> Tensor:
        """Return (T,) fp64, at each token the mean of `values` over its sample's response tokens.

        In a sample without any it is 0.

        Args:
            values: (T,)."""
        return self.sample_sums(values)[self._sample] / self.response_lengths.clamp(min=1)

    def gather(self, local: Tensor) -> Tensor:
        """Return (T,) from this rank's part of a value per token."""
        if self._ranks == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self._ranks)]
        # Over context parallelism, whose ranks hold the parts.
        dist.all_gather(parts, local.contiguous(), group=self._group)
        return torch.cat(parts)[gathered_order(self._cu_seqlens, self._ranks)]

    def local_part(self, values: Tensor) -> Tensor:
        """Return this rank's part of `values` (T,)."""
        if self._ranks == 1:
            return values
        return values[positions_of_rank(self._cu_seqlens, self._rank, self._ranks)]

    def token_rewards(self, kl_beta: float) -> Tensor:
        """Return `kl_penalized_rewards`, (T,).

        Args:
            kl_beta: the weight of the penalty; above 0 it needs logprobs["old"] and ["ref"]."""
        log_ratio = None
        if kl_beta:
            log_ratio = self.gather(self.batch.logprobs["old"] - self.batch.logprobs["ref"])
        return kl_penalized_rewards(
            self.token_outcome_advantages,
            log_ratio,
            kl_beta,
            self.is_response,
            self.last_response_positions,
        )
