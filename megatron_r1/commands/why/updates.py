"""A step's updates once more: autograd over fp64 formulas of the loss, and an AdamW of its own.

Nothing of it runs in the trainer: the model is transformers' class in fp32 (`policy_model`), the
loss is written out here from the papers, and the optimizer is its formula (Loshchilov and Hutter,
arXiv 1711.05101, with Adam's bias correction)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_r1.commands.why.policy_model import (
    RouterBiases,
    TokenRow,
    batches,
    seen_experts,
    token_logits,
    token_logprobs_and_entropies,
)

Moments = dict[str, Tensor]
"""By the parameter's name, fp32."""


@dataclass(frozen=True)
class LossRules:
    """The step's loss as its settings say, or with one thing substituted.

    Attributes:
        average: "sequence", "token" or "constant".
        constant: L, tokens, of average "constant".
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
            token has no policy gradient; None: no limit."""

    average: str
    constant: int
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


@dataclass(frozen=True)
class AdamRules:
    """AdamW's settings, and the learning rate of each update; the rest is substituted.

    Attributes:
        learning_rates: the rate of each update.
        beta1: as `optimizer.beta1`, like the next four.
        beta2: the decay of the second moment.
        epsilon: added to its root.
        weight_decay: the fraction times the learning rate.
        clip_grad: the largest norm of the gradient.
        decays_all: norms and biases decay too.
        decays_by_gradient: the decay is a part of the gradient, as in Adam before AdamW.
        gradient_factors: what the gradient of each update is multiplied by; (): nothing.
        moment_reset: "": never; "step", "update": the moments are zero before each of them,
            though the counter goes on.
        without_gradient: parameters whose gradient is zero.
        norms: the norm of the whole gradient in each update, where it has parts that are not
            computed here; None: that of what is."""

    learning_rates: tuple[float, ...]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_grad: float
    decays_all: bool = False
    decays_by_gradient: bool = False
    gradient_factors: tuple[float, ...] = ()
    moment_reset: str = ""
    without_gradient: Collection[str] = ()
    norms: tuple[float, ...] | None = None


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
        clipped: tokens where the clip is active.
        importance: the importance weights.
        largest_ratio: the largest ratio of a token, a maximum and no sum.
    """

    policy: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    denominator: float = 0.0
    num_tokens: int = 0
    kl_sum: float = 0.0
    entropy_sum: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
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
            "clip_fraction": self.clipped / count,
            "ratio/max": self.largest_ratio,
        }
        if loss.importance_cap is not None:
            metrics["importance"] = self.importance / count
        return Update(metrics, terms)


@dataclass
class Update:
    """What an update measures, under the names of metrics.jsonl.

    Attributes:
        metrics: loss, kl, entropy, clip_fraction, ratio/max, grad_norm, …
        terms: the policy's, KL's and the entropy's part of the loss."""

    metrics: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)


@dataclass
class Trace:
    """What an update computed, from which others are estimated without a model.

    Attributes:
        rows: the rows of the mini-batch.
        tokens: log-probability and entropy of each sampled token, float64, by row.
        gradients: the gradient of each parameter, before clipping."""

    rows: list[int]
    tokens: dict[int, tuple[Tensor, Tensor]]
    gradients: Moments


def denominator(rows: Sequence[TokenRow], loss: LossRules) -> float:
    """Return what the sum of an update's losses is divided by.

    Args:
        rows: those of the mini-batch that are trained on.
        loss: the loss."""
    if loss.average == "token" and loss.counts_prompts:
        count = sum(len(row.token_ids) for row in rows)
    elif loss.average == "token":
        count = sum(int(row.is_sampled.sum()) for row in rows)
    else:
        count = len({row.response for row in rows})
    return max(1, count)  # A substitution may leave out all responses of a mini-batch.


def _surrogate(
    row: TokenRow, logprobs: Tensor, old: Tensor, loss: LossRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy's term of each token, the ratio, and whether a clip is active.

    Args:
        row: the sequence.
        logprobs: the policy's log-probabilities of its sampled tokens.
        old: those of the policy before the step.
        loss: the rules of the loss."""
    x = logprobs - (logprobs.detach() if loss.is_on_policy else old)
    if loss.is_sequence_ratio:
        x = x.mean().expand_as(x)
    ratio = x.exp()
    clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    a = row.token_advantages if row.token_advantages is not None else row.advantage
    if loss.divergence is not None:
        rise = logprobs.detach().exp() - row.logprobs.double().exp()
        token_advantages, (fall, most) = (
            torch.as_tensor(a, dtype=rise.dtype).expand_as(rise),
            loss.divergence,
        )
        a = torch.where(
            torch.where(token_advantages > 0, rise > most, -rise > fall), 0.0, token_advantages
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


def row_loss(
    row: TokenRow,
    logprobs: Tensor,
    entropy: Tensor,
    old: Tensor,
    reference: Tensor | None,
    loss: LossRules,
    totals: Totals,
) -> Tensor:
    """Return a row's part of the loss, differentiable, and add to the sums.

    Args:
        row: the sequence.
        logprobs: the policy's log-probabilities of its sampled tokens, float64.
        entropy: likewise.
        old: those under the policy before the step.
        reference: those under the reference, or None.
        loss: the loss.
        totals: the sums of the update, with the denominator."""
    # An update on the first mini-batch begins at the old policy.
    surrogate, ratio, is_clipped = _surrogate(row, logprobs, old, loss)
    v = torch.ones_like(logprobs)
    if loss.importance_cap is not None:
        v = (old - row.logprobs.double()).exp().clamp(max=loss.importance_cap)
    kl = torch.zeros_like(logprobs)
    if reference is not None:
        g = reference - logprobs
        k3 = g.expm1() - g
        unbiased = (logprobs - old).exp() * k3
        kl = {"k1": -g, "k2": g * g / 2, "k3": k3, "unbiased": unbiased}[loss.kl_estimator]
    length = len(row.token_ids) if loss.counts_prompts else row.num_sampled
    weight = {"token": 1.0, "sequence": 1 / max(1, length), "constant": 1 / loss.constant}
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
    totals.clipped += float(is_clipped.sum())
    totals.importance += float(v.sum())
    if len(logprobs):
        totals.largest_ratio = max(totals.largest_ratio, float(ratio.detach().max()))
    return (parts[0] + parts[1] + parts[2]) / totals.denominator


class Adam:
    """AdamW on the CPU, as its formula says.

    Args:
        parameters: by name; they are changed.
        moments: first and second moments of each, which are copied; None: zeros.
        num_updates: updates that the bias correction has counted."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        moments: tuple[Moments, Moments] | None,
        num_updates: int,
    ) -> None:
        self._parameters, self.count = parameters, num_updates
        if moments is None:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            moments = zeros, zeros
        self.first, self.second = (
            {name: moment[name].detach().clone() for name in parameters} for moment in moments
        )

    @torch.no_grad()
    def step(self, gradients: Moments, rules: AdamRules, index: int) -> float:
        """Make an update and return the norm of the gradient before it is clipped.

        Args:
            gradients: by parameter; one that is missing has none.
            rules: the settings.
            index: the number of the update in the step."""
        self.count += 1
        rate = rules.learning_rates[index]
        factor = rules.gradient_factors[index] if rules.gradient_factors else 1.0
        used = {
            name: values * factor
            for name, values in gradients.items()
            if name not in rules.without_gradient
        }
        norm = math.sqrt(sum(float(values.double().square().sum()) for values in used.values()))
        if rules.norms is not None:
            norm = rules.norms[index]
        scale = min(1.0, rules.clip_grad / (norm + 1e-6))
        first_bias, second_bias = 1 - rules.beta1**self.count, 1 - rules.beta2**self.count
        for name, parameter in self._parameters.items():
            # As norms and biases do not.
            decays = rules.decays_all or (parameter.dim() > 1 and not name.endswith("bias"))
            decay = rules.weight_decay if decays else 0.0
            gradient = used[name] * scale if name in used else torch.zeros_like(parameter)
            if rules.decays_by_gradient:
                gradient, decay = gradient + decay * parameter, 0.0
            m = self.first[name].lerp_(gradient, 1 - rules.beta1)
            v = self.second[name].mul_(rules.beta2).add_(gradient.square() * (1 - rules.beta2))
            parameter.mul_(1 - rate * decay)
            parameter.sub_(rate / first_bias * m / ((v / second_bias).sqrt() + rules.epsilon))
        return norm

    def forget(self) -> None:
        """Set the moments to zero; the counter stays."""
        for moment in (*self.first.values(), *self.second.values()):
            moment.zero_()


class StepUpdates:
    """The updates of a step, from the weights and moments of the checkpoint before it.

    Args:
        model: the policy, which is changed.
        moments: first and second moments by parameter; None: zeros.
        num_updates: updates that Adam has counted.
        rows: the sequences of the step.
        old: log-probabilities under the policy before the step, by row.
        reference: those under the reference, by row, or None.
        bias_rate: how far a router's bias moves after each update; 0: it stays."""

    def __init__(
        self,
        model: Any,
        moments: tuple[Moments, Moments] | None,
        num_updates: int,
        rows: Sequence[TokenRow],
        old: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
        bias_rate: float = 0.0,
    ) -> None:
        self.model, self.rows = model, rows
        self._biases = RouterBiases(model, bias_rate) if bias_rate else None
        self._old, self._reference = old, reference
        self._parameters = dict(model.named_parameters())
        self.adam = Adam(self._parameters, moments, num_updates)
        self.traces: list[Trace] = []

    def run(
        self,
        minibatches: Sequence[Sequence[int]],
        loss: LossRules,
        adam: AdamRules,
        lost: Collection[int] = (),
    ) -> list[Update]:
        """Make one update on each mini-batch and return what it measures.

        Args:
            minibatches: the rows of each.
            loss: the loss.
            adam: the optimizer; a learning rate for each mini-batch.
            lost: rows whose gradient is lost; they count in metrics and denominators."""
        if adam.moment_reset:
            self.adam.forget()
        updates = []
        for index, rows in enumerate(minibatches):
            if adam.moment_reset == "update":
                self.adam.forget()
            updates.append(self._update(index, rows, loss, adam, lost))
        return updates

    def _update(
        self,
        index: int,
        indices: Sequence[int],
        loss: LossRules,
        adam: AdamRules,
        lost: Collection[int],
    ) -> Update:
        trained = [at for at in indices if self.rows[at].is_trained]
        totals = Totals()
        totals.denominator = denominator([self.rows[at] for at in trained], loss)
        trace = Trace(trained, {}, {})
        self.model.zero_grad()
        vocabulary = self.model.config.vocab_size
        for batch in batches([self.rows[at] for at in trained], vocabulary):
            members = [trained[at] for at in batch]
            terms = torch.zeros((), dtype=torch.float64)
            rows = [self.rows[at] for at in members]
            with seen_experts(self.model) as seen:
                computed = token_logits(self.model, rows)
            if self._biases is not None:
                self._biases.count(seen, rows)
            for at, logits in zip(members, computed, strict=True):
                logprobs, entropy = token_logprobs_and_entropies(
                    logits, self.rows[at], loss.temperature
                )
                trace.tokens[at] = logprobs.detach(), entropy.detach()
                reference = None if self._reference is None else self._reference[at]
                row = self.rows[at]
                term = row_loss(row, logprobs, entropy, self._old[at], reference, loss, totals)
                terms = terms + (term.detach() if at in lost else term)
            if terms.requires_grad:
                terms.backward()
        trace.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        self.traces.append(trace)
        update = totals.update(loss)
        if self._biases is not None:
            self._biases.update()
        update.metrics["grad_norm"] = self.adam.step(trace.gradients, adam, index)
        return update
