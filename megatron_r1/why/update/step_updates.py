"""A step's updates made again: autograd over fp64 formulas of the loss (`loss_formulas`) through
transformers' model in fp32, and AdamW by its formula (`adam`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.adapters import trained_parameters
from megatron_r1.why.policy.routed_experts import RouterBiases
from megatron_r1.why.policy.token_logprobs import (
    TokenRow,
    batches,
    token_logprobs_and_entropies,
)
from megatron_r1.why.update.adam import Adam, AdamRules, Moments
from megatron_r1.why.update.first_update import (
    FirstUpdate,
    KnownGradients,
    ModelPass,
    model_pass,
)
from megatron_r1.why.update.loss_formulas import (
    LossRules,
    Totals,
    Update,
    denominator,
    row_terms,
)
from megatron_r1.why.update.term_gradients import TermGradients, add_gradients


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
        old_logprobs: log-probabilities under the policy before the step, by row.
        ref_logprobs: those under the reference, by row, or None.
        bias_rate: how far a router's bias moves after each update; 0: it stays.
        first: the first update's forward passes, where they are kept."""

    def __init__(
        self,
        model: Any,
        moments: tuple[Moments, Moments] | None,
        num_updates: int,
        rows: Sequence[TokenRow],
        old_logprobs: Sequence[Tensor],
        ref_logprobs: Sequence[Tensor] | None,
        bias_rate: float = 0.0,
        first: FirstUpdate | None = None,
    ) -> None:
        self.model, self.rows, self._first = model, rows, first
        self._biases = RouterBiases(model, bias_rate) if bias_rate else None
        self._old_logprobs, self._ref_logprobs = old_logprobs, ref_logprobs
        self._parameters = trained_parameters(model)
        self.adam = Adam(self._parameters, moments, num_updates)
        self.traces: list[Trace] = []

    def run(
        self,
        minibatches: Sequence[Sequence[int]],
        loss: LossRules,
        adam: AdamRules,
        rows_without_gradient: Collection[int] = (),
        terms: TermGradients | None = None,
        *,
        is_known: bool = False,
        is_possible: Callable[[Sequence[Update]], bool] | None = None,
    ) -> list[Update]:
        """Make one update on each mini-batch and return what it measures; the last one is missing
        where the updates are not possible.

        Args:
            minibatches: the rows of each.
            loss: the loss.
            adam: the optimizer; a learning rate for each mini-batch.
            rows_without_gradient: those whose gradient is lost: they count in metrics and
                denominators.
            terms: where the gradient of each term of the loss is collected, and how often it is
                added; None: the gradients are those of their sum.
            is_known: whether the first update's loss is that of the settings.
            is_possible: whether updates may be what was recorded; the last of them has neither
                gradient nor norm yet; None: any may."""
        if adam.moment_reset:
            self.adam.forget()
        updates: list[Update] = []
        for index, rows in enumerate(minibatches):
            if adam.moment_reset == "update":
                self.adam.forget()
            last_check = is_possible if index == len(minibatches) - 1 else None
            computed = self._first_known(rows, terms) if is_known and not index else None
            if computed is None:
                computed = self._compute(
                    index, rows, loss, rows_without_gradient, terms, updates, last_check
                )
                if is_known and not index:
                    self._keep_first(rows, computed, terms)
            elif last_check is not None and not last_check([computed]):
                break
            if computed is None:
                break
            updates.append(computed)
            if self._biases is not None:
                self._biases.update()
            gradients = self.traces[-1].gradients
            norm = computed.metrics["grad_norm"] = self.adam.step(gradients, adam, index)
            if terms is not None:
                terms.end_update(adam.clip_scale(norm), adam.beta1)
        return updates

    def _first_known(self, minibatch: Sequence[int], terms: TermGradients | None) -> Update | None:
        """Return the first update as it was made before, and add its trace; None where it was not,
        or without the gradients of terms.

        Args:
            minibatch: its rows.
            terms: where the gradients of the terms are added."""
        first, rows = self._first, self._trained(minibatch)
        if first is None or first.known is None or not first.has_inputs(rows):
            return None
        known_gradients = first.known
        if terms is not None and not known_gradients.by_term:
            return None
        if self._biases is not None:
            for batch in self._batches(rows):
                self._biases.count(first.batch_pass(batch).experts, list(batch.values()))
        gradients = known_gradients.gradients
        if terms is not None:
            terms.add(known_gradients.by_term)
            gradients = terms.total()
        self.traces.append(Trace(list(rows), known_gradients.tokens, gradients))
        update = known_gradients.update
        return Update(dict(update.metrics), update.terms)

    def _keep_first(
        self, minibatch: Sequence[int], update: Update | None, terms: TermGradients | None
    ) -> None:
        """Keep what the first update computed for later recomputations.

        Args:
            minibatch: its rows.
            update: what it measures; None: it has no gradients.
            terms: the gradients of the terms; None: they were not computed."""
        first = self._first
        if update is None or first is None or not first.has_inputs(self._trained(minibatch)):
            return
        trace, by_term = self.traces[-1], {} if terms is None else terms.copied()
        measured = Update(dict(update.metrics), update.terms)
        first.known = KnownGradients(measured, trace.tokens, trace.gradients, by_term)

    def _trained(self, minibatch: Sequence[int]) -> dict[int, TokenRow]:
        """Return the rows of a mini-batch that are trained on, by number."""
        return {index: self.rows[index] for index in minibatch if self.rows[index].is_trained}

    def _batches(self, rows: Mapping[int, TokenRow]) -> list[dict[int, TokenRow]]:
        """Return the rows of each pass, by number."""
        indices, values = list(rows), list(rows.values())
        return [
            {indices[i]: values[i] for i in batch}
            for batch in batches(values, self.model.config.vocab_size)
        ]

    def _compute(
        self,
        index: int,
        minibatch: Sequence[int],
        loss: LossRules,
        rows_without_gradient: Collection[int],
        terms: TermGradients | None,
        earlier: Sequence[Update],
        is_possible: Callable[[Sequence[Update]], bool] | None,
    ) -> Update | None:
        """Compute an update's gradients, add its trace and return what it measures; None where that
        is not possible.

        Args:
            index: its number.
            minibatch: its rows.
            loss: as of `run`, like the next two.
            rows_without_gradient: those whose gradient is lost.
            terms: where the gradients of the terms are added.
            earlier: the updates before it.
            is_possible: as of `run`; it is asked before the last backward pass."""
        rows = self._trained(minibatch)
        first = self._first if index == 0 else None
        if first is not None and not first.has_inputs(rows):
            first = None
        totals = Totals(denominator=denominator(list(rows.values()), loss))
        trace = Trace(list(rows), {}, {})
        by_batch = self._batches(rows)
        for number, batch in enumerate(by_batch, 1):
            computed = self._pass(batch, first)
            terms_by_row = self._terms(batch, computed, loss, totals, trace)
            if self._biases is not None:
                self._biases.count(computed.experts, list(batch.values()))
            is_last = number == len(by_batch)
            if is_last and is_possible and not is_possible([*earlier, totals.update(loss)]):
                return None
            parameters = self._parameters if first is None else first.parameters
            keeps_graph = first is not None
            if terms is not None:
                terms.backward(terms_by_row, parameters, keeps_graph=keeps_graph)
                continue
            total = torch.zeros((), dtype=torch.float64)
            for row_index, row_parts in terms_by_row.items():
                part = sum(row_parts.values(), torch.zeros((), dtype=torch.float64))
                total = total + (part.detach() if row_index in rows_without_gradient else part)
            if total.requires_grad:
                add_gradients(trace.gradients, total, parameters, keeps_graph=keeps_graph)
        if terms is not None:
            self._add_left_out(index, loss, totals, terms, first)
            trace.gradients = terms.total()
        self.traces.append(trace)
        return totals.update(loss)

    def _pass(self, rows: Mapping[int, TokenRow], first: FirstUpdate | None) -> ModelPass:
        """Return the forward pass of a batch, that of the first update where it is given."""
        if first is not None:
            return first.batch_pass(rows)
        return model_pass(self.model, list(rows.values()))

    def _terms(
        self,
        rows: Mapping[int, TokenRow],
        computed: ModelPass,
        loss: LossRules,
        totals: Totals,
        trace: Trace | None,
    ) -> dict[int, dict[str, Tensor]]:
        """Return the terms of the loss of each row.

        Args:
            rows: by number.
            computed: their forward pass.
            loss: the loss.
            totals: the sums that they are added to.
            trace: where their log-probabilities are kept; None: nowhere."""
        terms_by_row = {}
        for (row_index, row), logits in zip(rows.items(), computed.logits, strict=True):
            logprobs, entropy = token_logprobs_and_entropies(logits, row, loss.temperature)
            if trace is not None:
                trace.tokens[row_index] = logprobs.detach(), entropy.detach()
            ref_logprobs = None if self._ref_logprobs is None else self._ref_logprobs[row_index]
            terms_by_row[row_index] = row_terms(
                row, logprobs, entropy, self._old_logprobs[row_index], ref_logprobs, loss, totals
            )
        return terms_by_row

    def _add_left_out(
        self,
        index: int,
        loss: LossRules,
        totals: Totals,
        terms: TermGradients,
        first: FirstUpdate | None,
    ) -> None:
        """Add the gradients of rows that are left out of the loss, at the same weights.

        Args:
            index: the number of the update.
            loss: the loss.
            totals: the sums of the rows that are not left out; they stay.
            terms: where they are added.
            first: the first update's forward passes, where it is that."""
        for batch in self._batches(terms.left_out(index)):
            left_out_totals = Totals(denominator=totals.denominator)
            computed = self._pass(batch, first)
            terms.backward(
                self._terms(batch, computed, loss, left_out_totals, None),
                self._parameters if first is None else first.parameters,
                keeps_graph=first is not None,
            )
