"""Computes the losses of the shipped algorithms in float64 for autograd, written from the
papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_r1.why.policy.token_rows import TokenRow

MAX_LOG_RATIO = 20.0
"""Where exponents are capped, as in the kernels: those of a policy that has collapsed."""


@dataclass(frozen=True)
class LossRules:
    """The step's loss as its settings say, or with a candidate cause in place.

    Attributes:
        average: "sequence", "token" or "constant".
        constant_length: L, tokens, of average "constant".
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage; None: no limit.
        is_sequence_ratio: one ratio per response.
        is_cispo: the clipped ratio is a weight of the log-probability.
        importance_cap: the largest weight by old policy over engine; None: no weights.
        kl_beta: the weight of KL; negative: with the wrong sign.
        kl_estimator: "k1", "k2", "k3" or "unbiased".
        entropy_coef: the weight of the entropy.
        temperature: the logits are divided by it.
        counts_prompts: divide by the tokens of prompt and response, as a denominator that counts
            masked tokens does.
        takes_larger: the larger of the free and the clipped term, as a clip of the other sign does.
        is_on_policy: the ratio is 1, as where the old policy is the current one.
        divergence: the largest fall and rise of a probability from the engine's, beyond which a
            token has no policy gradient; None: no limit.
        leaves_out: "first" or "last": that token of each sequence's response is not trained on, as
            under a mask that is too short; "": none.
        uses_engine_as_old: the old policy's log-probabilities are the engine's.
        inverts_ratio: the ratio is old policy over policy.
        inverts_importance: the weight is engine over old policy.
        reverses_kl: KL's estimate is of log(policy / reference) in place of its negative.
        keeps_slope: an inverted or reversed term has the gradient that it has without the change,
            as in a kernel whose derivative was not adapted."""

    average: str
    constant_length: int
    clip_low: float
    clip_high: float
    dual_clip: float | None
    is_sequence_ratio: bool
    is_cispo: bool
    importance_cap: float | None
    kl_beta: float
    kl_estimator: str
    entropy_coef: float
    temperature: float
    counts_prompts: bool = False
    takes_larger: bool = False
    is_on_policy: bool = False
    divergence: tuple[float, float] | None = None
    leaves_out: str = ""
    uses_engine_as_old: bool = False
    inverts_ratio: bool = False
    inverts_importance: bool = False
    reverses_kl: bool = False
    keeps_slope: bool = False


@dataclass
class Totals:
    """Sums over the rows of an update, float64.

    Attributes:
        policy: the policy's term of the loss.
        kl: the KL term, its weight included.
        entropy: the entropy's term, its weight included.
        denominator: what the three terms are divided by, as the loss is averaged.
        num_tokens: sampled tokens that are trained on.
        kl_sum: the KL estimates, nats, without their weight.
        entropy_sum: the entropies, nats, without their weight.
        num_clipped: tokens where the clip is active.
        importance_sum: the importance weights.
        largest_ratio: the largest ratio of a token, a maximum and no sum.
    """

    policy: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    denominator: float = 0.0
    num_tokens: int = 0
    kl_sum: float = 0.0
    entropy_sum: float = 0.0
    num_clipped: float = 0.0
    importance_sum: float = 0.0
    largest_ratio: float = 0.0

    def update(self, loss: LossRules) -> Update:
        """Return what the sums say, but for the gradient.

        Args:
            loss: the loss that they are of."""
        n, count = self.denominator, max(1, self.num_tokens)
        terms = {"policy": self.policy / n, "kl": self.kl / n, "entropy": self.entropy / n}
        metrics = {
            "loss": sum(terms.values()),
            "kl": self.kl_sum / count,
            "entropy": self.entropy_sum / count,
            "clip_fraction": self.num_clipped / count,
            "ratio/max": self.largest_ratio,
        }
        if loss.importance_cap is not None:
            metrics["importance"] = self.importance_sum / count
        return Update(metrics, terms)


@dataclass
class Update:
    """What an update measures, under the names of metrics.jsonl.

    Attributes:
        metrics: loss, kl, entropy, clip_fraction, ratio/max, grad_norm, …
        terms: the policy's, KL's and the entropy's part of the loss."""

    metrics: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)


def recomputed_loss_denominator(rows: Sequence[TokenRow], loss: LossRules) -> float:
    """Return what the sum of an update's losses is divided by.

    Args:
        rows: those of the mini-batch that are trained on.
        loss: its average says what is counted."""
    if loss.average == "token" and loss.counts_prompts:
        count = sum(len(row.token_ids) for row in rows)
    elif loss.average == "token":
        left_out = 1 if loss.leaves_out else 0
        count = sum(max(0, int(row.is_sampled.sum()) - left_out) for row in rows)
    else:
        count = len({row.response for row in rows})
    return max(1, count)  # A candidate cause may leave out all responses of a mini-batch.


def update_means(updates: Sequence[Update]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of several updates, the largest of a maximum and else the mean, and the
    magnitude of each term of the loss, mean over the updates.

    Args:
        updates: at least one; a metric that one of them lacks is left out."""
    metrics = {
        name: max(update.metrics[name] for update in updates)
        if name.endswith("/max")
        else sum(update.metrics[name] for update in updates) / len(updates)
        for name in updates[0].metrics
        if all(name in update.metrics for update in updates)  # the last may have no gradient yet
    }
    terms = {
        name: sum(abs(update.terms[name]) for update in updates) / len(updates)
        for name in updates[0].terms
    }
    return metrics, terms


def _clipped_surrogate(
    row: TokenRow, logprobs: Tensor, old_logprobs: Tensor, loss: LossRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy's term of each token, the ratio, and whether a clip is active."""
    x = logprobs - (logprobs.detach() if loss.is_on_policy else old_logprobs)
    if loss.inverts_ratio:
        x = _negate_log_ratio(x, loss)
    if loss.is_sequence_ratio:
        x = x.mean().expand_as(x)
    ratio = x.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    a = row.token_advantages if row.token_advantages is not None else row.advantage
    if loss.divergence is not None:
        rise = logprobs.detach().exp() - row.logprobs.double().exp()
        token_advantages = torch.as_tensor(a, dtype=rise.dtype).expand_as(rise)
        max_fall, max_rise = loss.divergence
        a = torch.where(
            torch.where(token_advantages > 0, rise > max_rise, -rise > max_fall),
            0.0,
            token_advantages,
        )
    if loss.is_cispo:
        surrogate = clipped.detach() * a * logprobs
        is_clipped = clipped != ratio
    else:
        pick = torch.maximum if loss.takes_larger else torch.minimum
        surrogate = pick(ratio * a, clipped * a)
        is_clipped = surrogate != ratio * a
        if loss.dual_clip is not None:
            floor = loss.dual_clip * torch.as_tensor(a, dtype=ratio.dtype).expand_as(ratio)
            is_below = (floor < 0) & (surrogate < floor)
            is_clipped = is_clipped | is_below
            surrogate = torch.where(is_below, floor, surrogate)
    return surrogate, ratio, is_clipped


def _negate_log_ratio(value: Tensor, loss: LossRules) -> Tensor:
    """Return the negative of a log-ratio; with `keeps_slope`, its gradient is the log-ratio's."""
    return value - 2 * value.detach() if loss.keeps_slope else -value


def _select_tokens(row: TokenRow, sampled_range: slice) -> TokenRow:
    """Return a row with the values of some of its sampled tokens alone."""
    advantages = row.token_advantages
    return replace(
        row,
        logprobs=row.logprobs[sampled_range],
        token_advantages=None if advantages is None else advantages[sampled_range],
    )


def row_loss(
    row: TokenRow,
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    loss: LossRules,
    totals: Totals,
) -> Tensor:
    """Return a row's part of the loss, differentiable, and add to the sums.

    Args:
        row: as of `row_terms`, like the others.
        logprobs: the policy's log-probabilities.
        entropy: its entropies.
        old_logprobs: the old policy's log-probabilities.
        ref_logprobs: the reference's.
        loss: the rules of the loss.
        totals: the sums of the update."""
    terms = row_terms(row, logprobs, entropy, old_logprobs, ref_logprobs, loss, totals)
    return terms["policy"] + terms["kl"] + terms["entropy"]


def row_terms(
    row: TokenRow,
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    loss: LossRules,
    totals: Totals,
) -> dict[str, Tensor]:
    """Return the terms of a row's part of the loss, "policy", "kl" and "entropy", differentiable,
    and add to the sums.

    Args:
        row: the sequence.
        logprobs: the policy's log-probabilities of its sampled tokens, float64.
        entropy: likewise.
        old_logprobs: those under the policy before the step.
        ref_logprobs: those under the reference, or None.
        loss: the rules of the loss.
        totals: the sums of the update, with the denominator."""
    num_sampled: float = row.num_sampled
    if loss.leaves_out and len(logprobs):
        num_sampled *= 1 - 1 / len(logprobs)  # of a branch, its share of the response
        sampled_range = slice(1, None) if loss.leaves_out == "first" else slice(-1)
        row = _select_tokens(row, sampled_range)
        logprobs, entropy = logprobs[sampled_range], entropy[sampled_range]
        old_logprobs = old_logprobs[sampled_range]
        ref_logprobs = None if ref_logprobs is None else ref_logprobs[sampled_range]
    if loss.uses_engine_as_old:
        old_logprobs = row.logprobs.double()
    # An update on the first mini-batch begins at the old policy.
    surrogate, ratio, is_clipped = _clipped_surrogate(row, logprobs, old_logprobs, loss)
    v = torch.ones_like(logprobs)
    if loss.importance_cap is not None:
        log_ratio = old_logprobs - row.logprobs.double()
        if loss.inverts_importance:
            log_ratio = -log_ratio
        v = log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(max=loss.importance_cap)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        g = ref_logprobs - logprobs
        if loss.reverses_kl:
            g = _negate_log_ratio(g, loss)
        capped_g = g.clamp(max=MAX_LOG_RATIO)
        k3 = capped_g.expm1() - capped_g
        unbiased = (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp() * k3
        kl = {"k1": -g, "k2": g * g / 2, "k3": k3, "unbiased": unbiased}[loss.kl_estimator]
    length = len(row.token_ids) if loss.counts_prompts else num_sampled
    weight = {"token": 1.0, "sequence": 1 / max(1, length), "constant": 1 / loss.constant_length}
    w = weight[loss.average]
    parts = (
        -w * (v * surrogate).sum(),
        w * loss.kl_beta * kl.sum(),
        -w * loss.entropy_coef * entropy.sum(),
    )
    totals.policy += float(parts[0].detach())
    totals.kl += float(parts[1].detach())
    totals.entropy += float(parts[2].detach())
    totals.num_tokens += len(logprobs)
    totals.kl_sum += float(kl.detach().sum())
    totals.entropy_sum += float(entropy.detach().sum())
    totals.num_clipped += float(is_clipped.sum())
    totals.importance_sum += float(v.sum())
    if len(logprobs):
        totals.largest_ratio = max(totals.largest_ratio, float(ratio.detach().max()))
    names = ("policy", "kl", "entropy")
    return {name: part / totals.denominator for name, part in zip(names, parts, strict=True)}
