"""The micro-batches of a rollout as algorithms of advantages per token get them: whole responses.

Trainer ranks compute these advantages once a rollout has log-probabilities. `RolloutBatches`
gathers whole responses, also where ranks of context parallelism hold parts of them, and reduces
over the whole rollout. What the controller sent for a response is then its reward, on each of its
tokens. `token_advantages` has the formulas, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.models.context_parallel import gathered_order, positions_of_rank
from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.metrics import Mean, Metrics, merge_reports
from megatron_r1.trainer.token_advantages import (
    discounted_sums,
    kl_penalized_rewards,
    standardize,
    sums_for_standardization,
)


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

    def __init__(self, batch: PackedBatch, context_group: ProcessGroup | None = None):
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


class RolloutBatches:
    """A rollout's micro-batches on this rank, with log-probabilities (and values) in them.

    Args:
        batches: the parts of this rank.
        context_group: the ranks that hold the batches' other parts; None: there are none.
        data_group: the data- and context-parallel ranks, which together hold every token of the
            rollout once; None: this process has all.

    Attributes:
        whole_microbatches: the whole responses of each micro-batch."""

    def __init__(
        self,
        batches: list[PackedBatch],
        context_group: ProcessGroup | None = None,
        data_group: ProcessGroup | None = None,
    ):
        self._data_group = data_group
        self.whole_microbatches = [WholeMicrobatch(batch, context_group) for batch in batches]

    def normalize(self, advantages: list[Tensor], epsilon: float) -> list[Tensor]:
        """Return `advantages` with mean 0 and deviation 1 over the rollout's response tokens.

        Args:
            advantages: (T,) per micro-batch.
            epsilon: added to the standard deviation, the population's.

        Returns:
            (T,) per micro-batch, 0 outside responses."""
        pairs = list(zip(self.whole_microbatches, advantages, strict=True))
        sums = torch.stack(
            [
                sums_for_standardization(r.local_part(a)[r.local_part(r.is_response)])
                for r, a in pairs
            ]
        ).sum(0)
        if self._data_group is not None:
            # Over data and context parallelism: mean and deviation are those of the whole rollout.
            dist.all_reduce(sums, group=self._data_group)
        return [torch.where(r.is_response, standardize(a, sums, epsilon), 0.0) for r, a in pairs]

    def mask_advantages(self, within_bounds: list[Tensor]) -> Metrics:
        """Set this rank's advantages of response tokens that are not within bounds to 0.

        Args:
            within_bounds: (T,) bool per micro-batch.

        Returns:
            engine_mask/tokens, the share of response tokens that are masked, and
            engine_mask/responses, the share of samples that have a masked token."""
        tokens, samples = "engine_mask/tokens", "engine_mask/responses"
        reports: list[Metrics] = [{tokens: Mean(0.0, 0), samples: Mean(0.0, 0)}]
        for microbatch, is_within_bounds in zip(
            self.whole_microbatches, within_bounds, strict=True
        ):
            batch, is_masked = microbatch.batch, microbatch.is_response & ~is_within_bounds
            local_mask = microbatch.local_part(is_masked)
            batch.advantages = torch.where(local_mask, 0.0, batch.advantages)
            reports.append({tokens: Mean(local_mask.sum(), batch.is_response.sum())})
            if microbatch.counts_samples:
                has_masked = microbatch.sample_sums(is_masked) > 0
                has_tokens = microbatch.sample_sums(torch.ones_like(is_masked)) > 0
                reports.append({samples: Mean(has_masked.sum(), has_tokens.sum())})
        return merge_reports(reports)

    def store_targets(self, targets: TokenTargets) -> None:
        """Replace the advantages, and the returns if any, in the micro-batches."""
        for number, microbatch in enumerate(self.whole_microbatches):
            microbatch.batch.advantages = microbatch.local_part(targets.advantages[number])
            if targets.returns is not None:
                microbatch.batch.returns = microbatch.local_part(targets.returns[number])


class TokenTargets(NamedTuple):
    """The result of an algorithm's token advantages, per micro-batch of a rollout.

    Attributes:
        advantages: (T,) each, 0 outside responses.
        returns: (T,) each, what a critic learns; None if there is no critic."""

    advantages: list[Tensor]
    returns: list[Tensor] | None = None


TokenAdvantages = Callable[[RolloutBatches, TokenAdvantageSettings], TokenTargets]
"""(rollout, settings) → advantages per token."""
EngineMaskFunction = Callable[[RolloutBatches, EngineMaskSettings], list[Tensor]]
"""(rollout, settings) → per micro-batch (T,) bool, whether a token keeps its advantage."""


def reward_to_go(rollout: RolloutBatches, settings: TokenAdvantageSettings) -> list[Tensor]:
    """Return A_t = Σ_{s≥t} discount^(s-t) r_s, r the penalized rewards, (T,) per micro-batch."""
    settings = TokenAdvantageSettings.of(settings)
    return [
        discounted_sums(
            r.token_rewards(settings.kl_beta),
            settings.discount,
            r.is_response,
            r.last_response_positions,
        )
        for r in rollout.whole_microbatches
    ]
