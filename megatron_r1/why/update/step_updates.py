"""A step's updates made again: autograd over fp64 formulas of the loss (`loss_formulas`) through
transformers' model in fp32, and AdamW by its formula (`adam`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.adapters import trained_parameters
from megatron_r1.why.policy.routed_experts import RouterBiases, seen_experts
from megatron_r1.why.policy.token_logprobs import (
    TokenRow,
    batches,
    token_logits,
    token_logprobs_and_entropies,
)
from megatron_r1.why.update.adam import Adam, AdamRules, Moments
from megatron_r1.why.update.loss_formulas import (
    LossRules,
    Totals,
    Update,
    denominator,
    row_loss,
)


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
        self._parameters = trained_parameters(model)
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
        trained = [row_index for row_index in indices if self.rows[row_index].is_trained]
        totals = Totals()
        totals.denominator = denominator([self.rows[row_index] for row_index in trained], loss)
        trace = Trace(trained, {}, {})
        self.model.zero_grad()
        vocabulary = self.model.config.vocab_size
        for batch in batches([self.rows[row_index] for row_index in trained], vocabulary):
            members = [trained[i] for i in batch]
            terms = torch.zeros((), dtype=torch.float64)
            rows = [self.rows[row_index] for row_index in members]
            with seen_experts(self.model) as pass_experts:
                computed = token_logits(self.model, rows)
            if self._biases is not None:
                self._biases.count(pass_experts, rows)
            for row_index, logits in zip(members, computed, strict=True):
                logprobs, entropy = token_logprobs_and_entropies(
                    logits, self.rows[row_index], loss.temperature
                )
                trace.tokens[row_index] = logprobs.detach(), entropy.detach()
                reference = None if self._reference is None else self._reference[row_index]
                row = self.rows[row_index]
                term = row_loss(
                    row, logprobs, entropy, self._old[row_index], reference, loss, totals
                )
                terms = terms + (term.detach() if row_index in lost else term)
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
