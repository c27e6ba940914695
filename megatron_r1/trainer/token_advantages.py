"""Formulas of advantages per token: rewards of tokens, discounted sums, GAE, standardization.

They are on plain tensors. (T,): the tokens of some samples laid end to end, each token where it is
predicted. mask: (T,) bool, the response tokens that count, on which alone values are
read and results are not 0. Between two of them there may be given tokens (a tool's result): "the
next token" is the next of the mask. last: (T,) int64, for each token the position of its sample's
last response token. A sample without one has a value below all of its positions, so that no sum
crosses into another response. Nothing is divided here: the denominator is the loss's
(`losses.loss_denominator`). Results have the dtype of the tensors given.

`rollout_batches` has the batches of a rollout that an algorithm applies them to."""

import torch
from torch import Tensor


def kl_penalized_rewards(
    rewards: Tensor, log_ratio: Tensor | None, kl_beta: float, mask: Tensor, last: Tensor
) -> Tensor:
    """Return (T,), the rewards of tokens (DeepSeekMath, arXiv 2402.03300, eq. 2).

        r_t = -kl_beta log(π_old / π_ref)_t, plus the response's reward at its last token

    The penalty is the estimate k1; summed over a response it is unbiased for KL(π_old ‖ π_ref) of
    whole responses.

    Args:
        rewards: (T,), the response's on each of its tokens.
        log_ratio: (T,), nats, log(π_old / π_ref); not read with kl_beta 0.
        kl_beta: the weight of the penalty.
        mask: (T,) bool, the response tokens that count.
        last: (T,) int64, the position of the last response token of each token's sample."""
    positions = torch.arange(len(rewards), device=rewards.device)
    at_end = torch.where(positions == last, rewards, 0.0)
    if kl_beta:
        assert log_ratio is not None, "a penalty needs log-probabilities"
        at_end = at_end - kl_beta * log_ratio
    return torch.where(mask, at_end, 0.0)


def discounted_sums(values: Tensor, discount: float, mask: Tensor, last: Tensor) -> Tensor:
    """Return (T,), sums over the rest of the response, the token's own value first.

        x_t = Σ_{s≥t} discount^(s-t) values_s = values_t + discount x_{t+1}

    Computed by doubling: each pass adds the sums over the next 1, 2, 4 … tokens, so that a response
    of 32,768 takes 15 passes over the tokens, not 32,768.

    Args:
        values: (T,).
        discount: γ.
        mask: (T,) bool, the response tokens that count.
        last: (T,) int64, the position of the last response token of each token's sample."""
    rows, ends = _response_positions(mask, last)
    sums = values[rows]
    positions = torch.arange(len(rows), device=values.device)
    max_length = int((ends - positions).max()) + 1 if len(rows) else 0
    reach, factor = 1, discount
    while reach < max_length and factor:
        positions_ahead = positions + reach
        sums_ahead = sums[positions_ahead.clamp(max=len(sums) - 1)]
        sums = sums + factor * torch.where(positions_ahead <= ends, sums_ahead, 0.0)
        reach, factor = 2 * reach, factor * factor
    return torch.zeros_like(values).index_copy(0, rows, sums)


def gae(
    rewards: Tensor, values: Tensor, discount: float, gae_lambda: float, mask: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """Return generalized advantages and the critic's targets, (T,) each.

    arXiv 1506.02438, eq. 16; PPO, arXiv 1707.06347, eq. 11-12; γ is `discount`, λ `gae_lambda`:

        δ_t = r_t + γ V_{t+1} - V_t,  V = 0 after the last token, also of a truncated response
        A_t = Σ_{s≥t} (γ λ)^(s-t) δ_s,  R_t = A_t + V_t

    Args:
        rewards: (T,), r, as of `kl_penalized_rewards`.
        values: (T,), V.
        discount: γ.
        gae_lambda: λ.
        mask: (T,) bool, the response tokens that count.
        last: (T,) int64, the position of the last response token of each token's sample.

    Returns:
        A, 0 where the mask is 0, and R, there V."""
    rows, ends = _response_positions(mask, last)
    response_values = values[rows]
    positions = torch.arange(len(rows), device=values.device)
    next_values = torch.where(positions < ends, response_values.roll(-1), 0.0)
    deltas = torch.zeros_like(values).index_copy(
        0, rows, rewards[rows] + discount * next_values - response_values
    )
    advantages = discounted_sums(deltas, discount * gae_lambda, mask, last)
    return advantages, advantages + values


def sums_for_standardization(values: Tensor) -> Tensor:
    """Return (3,) fp64: the sum of `values` (N,), the sum of their squares, and N.

    The sums of the parts of a rollout add up to those of the whole."""
    values = values.double()
    return torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])


def standardize(values: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """Return (values - mean) / (std + epsilon), in fp64 but for the result.

    With a deviation of 0 and epsilon 0 nothing is divided.

    Args:
        values: (N,).
        total: (3,) fp64, the `sums_for_standardization` of all values that mean and population
            standard deviation are of.
        epsilon: added to the deviation."""
    mean, mean_square = (total[:2] / total[2].clamp(min=1)).unbind()
    # Of equal values the rounded difference may be below 0.
    scale = (mean_square - mean.square()).clamp(min=0).sqrt() + epsilon
    scale = torch.where(scale > 0, scale, 1.0)
    return ((values.double() - mean) / scale).to(values.dtype)


def _response_positions(mask: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions where the mask is set, (N,) int64, and the end of each one's sample.

    The end is the number, among the N, of the last one of the sample."""
    rows = mask.nonzero()[:, 0]
    number = mask.long().cumsum(0) - 1
    return rows, number[last[rows]]
