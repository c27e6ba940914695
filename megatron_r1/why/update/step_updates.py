"""Runs a step's updates: autograd over fp64 formulas of the loss (`loss_formulas`) through
transformers' model in fp32, and AdamW by its formula (`adam`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.routed_experts import RouterBiases
from megatron_r1.why.policy.token_logprobs import length_batches, token_logprobs_and_entropies
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.policy.transformers_adapters import trained_parameters
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
    recomputed_loss_denominator,
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
        first_update: the first update's forward passes, where they are kept."""

    def __init__(
        self,
        model: Any,
        moments: tuple[Moments, Moments] | None,
        num_updates: int,
        rows: Sequence[TokenRow],
        old_logprobs: Sequence[Tensor],
        ref_logprobs: Sequence[Tensor] | None,
        bias_rate: float = 0.0,
        first_update: FirstUpdate | None = None,
    ) -> None:
        self.model, self.rows, self._first_update = model, rows, first_update
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
            loss: the rules of the loss.
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
            update = self._reuse_first_update(rows, terms) if is_known and not index else None
            if update is None:
                update = self._compute_update(
                    index, rows, loss, rows_without_gradient, terms, updates, last_check
                )
                if is_known and not index:
                    self._keep_first_update(rows, update, terms)
            elif last_check is not None and not last_check([update]):
                break
            if update is None:
                break
            updates.append(update)
            if self._biases is not None:
                self._biases.update()
            gradients = self.traces[-1].gradients
            norm = update.metrics["grad_norm"] = self.adam.step(gradients, adam, index)
            if terms is not None:
                terms.end_update(adam.clip_scale(norm), adam.beta1)
        return updates

    def _reuse_first_update(
        self, minibatch: Sequence[int], terms: TermGradients | None
    ) -> Update | None:
        """Return the first update as it was made before, and add its trace; None where it was not,
        or without the gradients of terms."""
        first_update, rows = self._first_update, self._trained_rows(minibatch)
        if (
            first_update is None
            or first_update.known_gradients is None
            or not first_update.has_inputs(rows)
        ):
            return None
        known_gradients = first_update.known_gradients
        if terms is not None and not known_gradients.by_term:
            return None
        if self._biases is not None:
            for batch in self._batched_rows(rows):
                self._biases.count(first_update.batch_pass(batch).experts, list(batch.values()))
        gradients = known_gradients.gradients
        if terms is not None:
            terms.add(known_gradients.by_term)
            gradients = terms.loss_gradient()
        self.traces.append(Trace(list(rows), known_gradients.tokens, gradients))
        update = known_gradients.update
        return Update(dict(update.metrics), update.terms)

    def _keep_first_update(
        self, minibatch: Sequence[int], update: Update | None, terms: TermGradients | None
    ) -> None:
        """Keep what the first update computed for later recomputations."""
        first_update = self._first_update
        if (
            update is None
            or first_update is None
            or not first_update.has_inputs(self._trained_rows(minibatch))
        ):
            return
        trace, by_term = self.traces[-1], {} if terms is None else terms.copy_gradients()
        copied_update = Update(dict(update.metrics), update.terms)
        first_update.known_gradients = KnownGradients(
            copied_update, trace.tokens, trace.gradients, by_term
        )

    def _trained_rows(self, minibatch: Sequence[int]) -> dict[int, TokenRow]:
        """Return the rows of a mini-batch that are trained on, by number."""
        return {index: self.rows[index] for index in minibatch if self.rows[index].is_trained}

    def _batched_rows(self, rows: Mapping[int, TokenRow]) -> list[dict[int, TokenRow]]:
        """Return the rows of each pass, by number."""
        indices, values = list(rows), list(rows.values())
        return [
            {indices[i]: values[i] for i in batch}
            for batch in length_batches(values, self.model.config.vocab_size)
        ]

    def _compute_update(
        self,
        index: int,
        minibatch: Sequence[int],
        loss: LossRules,
        rows_without_gradient: Collection[int],
        terms: TermGradients | None,
        earlier_updates: Sequence[Update],
        is_possible: Callable[[Sequence[Update]], bool] | None,
    ) -> Update | None:
        """Compute an update's gradients, add its trace and return what it measures; None where that
        is not possible."""
        rows = self._trained_rows(minibatch)
        first_update = self._first_update if index == 0 else None
        if first_update is not None and not first_update.has_inputs(rows):
            first_update = None
        totals = Totals(denominator=recomputed_loss_denominator(list(rows.values()), loss))
        trace = Trace(list(rows), {}, {})
        by_batch = self._batched_rows(rows)
        for number, batch in enumerate(by_batch, 1):
            forward_pass = self._forward_pass(batch, first_update)
            terms_by_row = self._loss_terms(batch, forward_pass, loss, totals, trace)
            if self._biases is not None:
                self._biases.count(forward_pass.experts, list(batch.values()))
            is_last = number == len(by_batch)
            if is_last and is_possible and not is_possible([*earlier_updates, totals.update(loss)]):
                return None
            parameters = self._parameters if first_update is None else first_update.parameters
            keeps_graph = first_update is not None
            if terms is not None:
                terms.backward(terms_by_row, parameters, keeps_graph=keeps_graph)
                continue
            loss_part = torch.zeros((), dtype=torch.float64)
            for row_index, row_parts in terms_by_row.items():
                part = sum(row_parts.values(), torch.zeros((), dtype=torch.float64))
                loss_part = loss_part + (
                    part.detach() if row_index in rows_without_gradient else part
                )
            if loss_part.requires_grad:
                add_gradients(trace.gradients, loss_part, parameters, keeps_graph=keeps_graph)
        if terms is not None:
            self._add_left_out(index, loss, totals, terms, first_update)
            trace.gradients = terms.loss_gradient()
        self.traces.append(trace)
        return totals.update(loss)

    def _forward_pass(
        self, rows: Mapping[int, TokenRow], first_update: FirstUpdate | None
    ) -> ModelPass:
        """Return the forward pass of a batch, that of the first update where it is given."""
        if first_update is not None:
            return first_update.batch_pass(rows)
        return model_pass(self.model, list(rows.values()))

    def _loss_terms(
        self,
        rows: Mapping[int, TokenRow],
        forward_pass: ModelPass,
        loss: LossRules,
        totals: Totals,
        trace: Trace | None,
    ) -> dict[int, dict[str, Tensor]]:
        """Return the terms of the loss of each row."""
        terms_by_row = {}
        for (row_index, row), logits in zip(rows.items(), forward_pass.logits, strict=True):
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
        first_update: FirstUpdate | None,
    ) -> None:
        """Add the gradients of rows that are left out of the loss, at the same weights."""
        for batch in self._batched_rows(terms.left_out_rows(index)):
            left_out_totals = Totals(denominator=totals.denominator)
            forward_pass = self._forward_pass(batch, first_update)
            terms.backward(
                self._loss_terms(batch, forward_pass, loss, left_out_totals, None),
                self._parameters if first_update is None else first_update.parameters,
                keeps_graph=first_update is not None,
            )
