"""Advantages per token, computed on the trainer ranks once a rollout has log-probabilities.

An estimator of such advantages gets the batches as `ScoredRollout`, which gathers whole responses,
also where ranks of context parallelism hold parts of them, and reduces over the whole rollout. The
mathematics on the gathered tensors is in `returns`. What the controller sent as a response's
advantage is then its reward, on each of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config.losses import TokenSettings
from megatron_r1.models.context import held_positions, sample_order
from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.returns import (
    discounted_sums,
    moments,
    penalized_rewards,
    standardized,
)


class WholeResponses:
    """The whole responses of one micro-batch, on every rank that holds a part of them.

    T is the number of tokens of the whole micro-batch, in sample order.

    Args:
        batch: the part of this rank.
        context_group: the ranks that hold the batch's other parts; None: there are none.

    Attributes:
        is_response: (T,) bool, the tokens that are trained on.
        rewards: (T,), the response's on each of its tokens.
        last: (T,) int64, the position of the last response token of each token's sample, or -1."""

    def __init__(self, batch: PackedBatch, context_group: ProcessGroup | None = None):
        self.batch, self._group = batch, context_group
        self._ranks = 1 if context_group is None else dist.get_world_size(context_group)
        self._rank = 0 if context_group is None else dist.get_rank(context_group)
        self._cu_seqlens = batch.cu_seqlens.long() * self._ranks
        self.is_response = self.whole(batch.is_response.to(torch.uint8)).bool()
        self.rewards = self.whole(batch.advantages)
        self.last = self._last_of_each()

    def _last_of_each(self) -> Tensor:
        lengths = self._cu_seqlens.diff()
        sample = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        ends = torch.full_like(lengths, -1)
        position = torch.arange(len(sample), device=lengths.device)
        seen = torch.where(self.is_response, position, -1)
        return ends.scatter_reduce(0, sample, seen, "amax")[sample]

    def whole(self, part: Tensor) -> Tensor:
        """Return (T,) from this rank's part of a value per token."""
        if self._ranks == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self._ranks)]
        # Over context parallelism, whose ranks hold the parts.
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts)[sample_order(self._cu_seqlens, self._ranks)]

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole` (T,)."""
        if self._ranks == 1:
            return whole
        return whole[held_positions(self._cu_seqlens, self._rank, self._ranks)]

    def token_rewards(self, kl_beta: float) -> Tensor:
        """Return `returns.penalized_rewards`, (T,).

        Args:
            kl_beta: the weight of the penalty; above 0 it needs logprobs["old"] and ["ref"]."""
        log_ratio = None
        if kl_beta:
            log_ratio = self.whole(self.batch.logprobs["old"] - self.batch.logprobs["ref"])
        return penalized_rewards(self.rewards, log_ratio, kl_beta, self.is_response, self.last)


class ScoredRollout:
    """A rollout's micro-batches on this rank, with log-probabilities (and values) in them.

    Args:
        batches: the parts of this rank.
        context_group: the ranks that hold the batches' other parts; None: there are none.
        data_group: the data- and context-parallel ranks, which together hold every token of the
            rollout once; None: this process has all.

    Attributes:
        responses: the whole responses of each micro-batch."""

    def __init__(
        self,
        batches: list[PackedBatch],
        context_group: ProcessGroup | None = None,
        data_group: ProcessGroup | None = None,
    ):
        self._data_group = data_group
        self.responses = [WholeResponses(batch, context_group) for batch in batches]

    def normalized(self, advantages: list[Tensor], epsilon: float) -> list[Tensor]:
        """Return `advantages` with mean 0 and deviation 1 over the rollout's response tokens.

        Args:
            advantages: (T,) per micro-batch.
            epsilon: added to the standard deviation, the population's.

        Returns:
            (T,) per micro-batch, 0 outside responses."""
        pairs = list(zip(self.responses, advantages, strict=True))
        total = torch.stack([moments(r.own(a)[r.own(r.is_response)]) for r, a in pairs]).sum(0)
        if self._data_group is not None:
            # Over data and context parallelism: mean and deviation are those of the whole rollout.
            dist.all_reduce(total, group=self._data_group)
        return [torch.where(r.is_response, standardized(a, total, epsilon), 0.0) for r, a in pairs]

    def store(self, targets: TokenTargets) -> None:
        """Replace the advantages, and the returns if any, in the micro-batches."""
        for number, responses in enumerate(self.responses):
            responses.batch.advantages = responses.own(targets.advantages[number])
            if targets.returns is not None:
                responses.batch.returns = responses.own(targets.returns[number])


class TokenTargets(NamedTuple):
    """The result of an algorithm's token advantages, per micro-batch of a rollout.

    Attributes:
        advantages: (T,) each, 0 outside responses.
        returns: (T,) each, what a critic learns; None if there is no critic."""

    advantages: list[Tensor]
    returns: list[Tensor] | None = None


TokenAdvantages = Callable[[ScoredRollout, TokenSettings], TokenTargets]
"""(scored rollout, settings) → advantages per token."""


def reward_to_go(scored: ScoredRollout, settings: TokenSettings) -> list[Tensor]:
    """Return A_t = Σ_{s≥t} discount^(s-t) r_s, r the penalized rewards, (T,) per micro-batch."""
    settings = TokenSettings.of(settings)
    return [
        discounted_sums(r.token_rewards(settings.kl_beta), settings.discount, r.is_response, r.last)
        for r in scored.responses
    ]
