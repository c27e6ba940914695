"""Computes an advantage for each token, in float64, from the definitions of the algorithms that
have them, and of the masks that set some to 0.

    reinforce_pp   A_t = γ^(T-t) r - β Σ_{s≥t} γ^(s-t) log(π_old / π_ref)_s, with mean 0 and
                   deviation 1 over all tokens (arXiv 2501.03262, section 3)
    rloo           the same of r_i - mean of the others' rewards, as it is (arXiv 2402.14740)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep

ADVANTAGE_MASKS = ("token", "sequence")
"""Masks that are known before the updates; of the others "divergence" is a part of the loss."""


def with_token_advantages(
    step: RecordedStep,
    rows: Sequence[TokenRow],
    old_logprobs: Sequence[Tensor],
    ref_logprobs: Sequence[Tensor] | None,
) -> list[TokenRow]:
    """Return the rows with an advantage for each token, where the step's settings have them.

    Args:
        step: what the run recorded of it.
        rows: its sequences, with an advantage each.
        old_logprobs: log-probabilities of the sampled tokens under the policy before the step, by
            row.
        ref_logprobs: those under the reference, or None."""
    rl = step.config.rl
    new_rows = list(rows)
    if step.rules.kl_in_reward:
        values = [
            _rewards_to_go(
                row,
                old_logprobs[index],
                None if ref_logprobs is None else ref_logprobs[index],
                step,
            )
            for index, row in enumerate(rows)
        ]
        if rl.advantage_std == "batch":
            trained_values = [v for v, row in zip(values, rows, strict=True) if row.is_trained]
            all_values = torch.cat(trained_values) if trained_values else torch.zeros(1)
            mean = all_values.mean()
            deviation = all_values.std(unbiased=False) + rl.advantage_epsilon
            values = [(value - mean) / deviation for value in values]
        new_rows = [
            replace(row, token_advantages=v) for row, v in zip(new_rows, values, strict=True)
        ]
    if rl.engine_mask in ADVANTAGE_MASKS:
        bounds = rl.engine_mask_settings
        new_rows = [
            _mask_advantages(row, old_logprobs[index], bounds) for index, row in enumerate(new_rows)
        ]
    return new_rows


def _rewards_to_go(
    row: TokenRow, old_logprobs: Tensor, ref_logprobs: Tensor | None, step: RecordedStep
) -> Tensor:
    """Return the discounted sums of what follows each token, itself included."""
    rl = step.config.rl
    rewards = torch.zeros_like(old_logprobs)
    if ref_logprobs is not None and rl.kl_beta:
        rewards = rewards - rl.kl_beta * (old_logprobs - ref_logprobs)
    if len(rewards):
        rewards[-1] += row.advantage
    sums, total = torch.zeros_like(rewards), torch.zeros((), dtype=rewards.dtype)
    for position in range(len(rewards) - 1, -1, -1):
        total = rewards[position] + rl.discount * total
        sums[position] = total
    return sums


def _mask_advantages(row: TokenRow, old_logprobs: Tensor, bounds: EngineMaskSettings) -> TokenRow:
    log_ratios = old_logprobs - row.logprobs.double()
    if bounds.method == "sequence":
        log_ratios = log_ratios.mean().expand_as(log_ratios)
    is_kept = (log_ratios.exp() >= bounds.low) & (log_ratios.exp() <= bounds.high)
    advantages = row.token_advantages
    if advantages is None:
        advantages = torch.full_like(log_ratios, row.advantage)
    return replace(row, token_advantages=advantages * is_kept)
