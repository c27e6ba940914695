"""A step's updates made again: autograd over fp64 formulas of the loss (`loss_formulas`) through
transformers' model in fp32, and AdamW by its formula (`adam`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    row_terms,
)
from megatron_r1.why.update.term_gradients import TermGradients


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
        terms: TermGradients | None = None,
    ) -> list[Update]:
        """Make one update on each mini-batch and return what it measures.

        Args:
            minibatches: the rows of each.
            loss: the loss.
            adam: the optimizer; a learning rate for each mini-batch.
            lost: rows whose gradient is lost; they count in metrics and denominators.
            terms: where the gradient of each term of the loss is collected, and how often it is
                added; None: the gradients are those of their sum."""
        if adam.moment_reset:
            self.adam.forget()
        updates = []
        for index, rows in enumerate(minibatches):
            if adam.moment_reset == "update":
                self.adam.forget()
            updates.append(self._update(index, rows, loss, adam, lost, terms))
        return updates

    def _update(
        self,
        index: int,
        indices: Sequence[int],
        loss: LossRules,
        adam: AdamRules,
        lost: Collection[int],
        terms: TermGradients | None,
    ) -> Update:
        trained = [row_index for row_index in indices if self.rows[row_index].is_trained]
        totals = Totals()
        totals.denominator = denominator([self.rows[row_index] for row_index in trained], loss)
        trace = Trace(trained, {}, {})
        self.model.zero_grad()
        vocabulary = self.model.config.vocab_size
        for batch in batches([self.rows[row_index] for row_index in trained], vocabulary):
            rows = {trained[i]: self.rows[trained[i]] for i in batch}
            with seen_experts(self.model) as pass_experts:
                terms_by_row = self._terms(rows, loss, totals, trace)
            if self._biases is not None:
                self._biases.count(pass_experts, list(rows.values()))
            if terms is not None:
                terms.backward(terms_by_row, self._parameters)
                continue
            total = torch.zeros((), dtype=torch.float64)
            for row_index, row_parts in terms_by_row.items():
                part = sum(row_parts.values(), torch.zeros((), dtype=torch.float64))
                total = total + (part.detach() if row_index in lost else part)
            if total.requires_grad:
                total.backward()
        if terms is None:
            trace.gradients = {
                name: parameter.grad.clone()
                for name, parameter in self._parameters.items()
                if parameter.grad is not None
            }
        else:
            self._add_left_out(index, loss, totals, terms)
            trace.gradients = terms.total()
        self.traces.append(trace)
        update = totals.update(loss)
        if self._biases is not None:
            self._biases.update()
        norm = update.metrics["grad_norm"] = self.adam.step(trace.gradients, adam, index)
        if terms is not None:
            terms.end_update(adam.clip_scale(norm), adam.beta1)
        return update

    def _terms(
        self, rows: Mapping[int, TokenRow], loss: LossRules, totals: Totals, trace: Trace | None
    ) -> dict[int, dict[str, Tensor]]:
        """Return the terms of the loss of each row, in one pass.

        Args:
            rows: by number.
            loss: the loss.
            totals: the sums that they are added to.
            trace: where their log-probabilities are kept; None: nowhere."""
        terms_by_row = {}
        computed = token_logits(self.model, list(rows.values()))
        for (row_index, row), logits in zip(rows.items(), computed, strict=True):
            logprobs, entropy = token_logprobs_and_entropies(logits, row, loss.temperature)
            if trace is not None:
                trace.tokens[row_index] = logprobs.detach(), entropy.detach()
            reference = None if self._reference is None else self._reference[row_index]
            terms_by_row[row_index] = row_terms(
                row, logprobs, entropy, self._old[row_index], reference, loss, totals
            )
        return terms_by_row

    def _add_left_out(
        self, index: int, loss: LossRules, totals: Totals, terms: TermGradients
    ) -> None:
        """Add the gradients of rows that are left out of the loss, at the same weights.

        Args:
            index: the number of the update.
            loss: the loss.
            totals: the sums of the rows that are not left out; they stay.
            terms: where they are added."""
        left_out = terms.left_out(index)
        indices, rows = list(left_out), list(left_out.values())
        for batch in batches(rows, self.model.config.vocab_size):
            left_out_totals = Totals(denominator=totals.denominator)
            members = {indices[i]: rows[i] for i in batch}
            terms.backward(self._terms(members, loss, left_out_totals, None), self._parameters)
