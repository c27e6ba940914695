"""The micro-batches of a rollout as algorithms of advantages per token get them: whole responses.

Trainer ranks compute these advantages once a rollout has log-probabilities. `RolloutBatches` has
the `WholeMicrobatch` of each micro-batch, and reduces over the whole rollout. `token_advantages`
has the formulas, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.metrics import Mean, Metrics, merge_reports
from megatron_r1.trainer.token_advantages import (
    discounted_sums,
    standardize,
    sums_for_standardization,
)
from megatron_r1.trainer.whole_microbatch import WholeMicrobatch


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
        batches: list[PackedMicrobatch],
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
