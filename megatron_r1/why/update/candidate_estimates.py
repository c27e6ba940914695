"""Estimates without a pass of the model how far updates with a candidate cause would be from what a
run recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.policy.transformers_adapters import trained_parameters
from megatron_r1.why.update.adam import Adam
from megatron_r1.why.update.candidate_cause import CandidateCause
from megatron_r1.why.update.checkpoint_after import CheckpointAfter
from megatron_r1.why.update.loss_formulas import (
    LossRules,
    Totals,
    recomputed_loss_denominator,
    row_loss,
    update_means,
)
from megatron_r1.why.update.recomputed_token_advantages import with_token_advantages
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.update_inputs import UpdateInputs

UNKNOWN_DISTANCE = 1.05
"""The distance of a candidate that cannot be estimated, which is tried after those that seem to
explain the whole departure (nearly 1) and before all others."""


class CandidateEstimates:
    """Estimates of candidate causes, from the log-probabilities and gradients of the updates as the
    settings say.

    Args:
        inputs: what the updates are made of.
        after: the checkpoint after the step.
        updates: the updates as the settings say.
        base_metrics: their metrics, mean over them.
        norms: `AdamRules.norms`.
        scratch_model: returns a copy of the policy before the step, which may be changed."""

    def __init__(
        self,
        inputs: UpdateInputs,
        after: CheckpointAfter,
        updates: StepUpdates,
        base_metrics: Mapping[str, float],
        norms: tuple[float, ...] | None,
        scratch_model: Callable[[], Any],
    ) -> None:
        self._step, self._policies, self._inputs = inputs.step, inputs.policies, inputs
        self._after, self._updates = after, updates
        self._base_metrics, self._norms, self._scratch_model = base_metrics, norms, scratch_model

    def distance(self, candidate: CandidateCause, logged_metrics: Mapping[str, Any]) -> float:
        """Return an estimate of how far the updates with a candidate would be from what was
        recorded: 1 near, 2 far.

        Args:
            candidate: what is computed otherwise.
            logged_metrics: the step's line of metrics.jsonl."""
        if "temperature" in dict(candidate.loss):
            return UNKNOWN_DISTANCE
        if candidate.loss or candidate.advantages is not None:
            return self._estimated_loss_distance(candidate, logged_metrics)
        if not (candidate.adam or candidate.loses_moments):
            return UNKNOWN_DISTANCE
        if self._after.model is None:
            return 2.0
        return 1.0 + min(1.0, self._estimated_change_distance(candidate))

    def _estimated_loss_distance(
        self, candidate: CandidateCause, logged_metrics: Mapping[str, Any]
    ) -> float:
        """Return 1 plus the distance of the metrics with another loss or other advantages from the
        logged ones, relative to that by the settings. Each metric counts with at most 1."""
        rows = self._inputs.candidate_rows(candidate)
        reference = self._candidate_reference(candidate)
        rows = with_token_advantages(self._step, rows, self._policies.all_old_logprobs, reference)
        if [row.is_trained for row in rows] != [row.is_trained for row in self._inputs.models.rows]:
            return UNKNOWN_DISTANCE
        rules = replace(self._inputs.loss_rules(), **dict(candidate.loss))
        metrics = self._estimated_metrics(rows, reference, rules)
        gaps = []
        for name, base_value in self._base_metrics.items():
            value = logged_metrics.get(name)
            if name == "grad_norm" or name not in metrics or not isinstance(value, int | float):
                continue
            gap = abs(metrics[name] - float(value))
            gaps.append(min(1.0, gap / max(1e-9, abs(base_value - float(value)))))
        return 1.0 + sum(gaps) / max(1, len(gaps))

    def _estimated_metrics(
        self, rows: Sequence[TokenRow], ref_logprobs: Sequence[Tensor] | None, rules: LossRules
    ) -> dict[str, float]:
        """Return the metrics of a loss of the log-probabilities and entropies by the settings."""
        updates = []
        for trace in self._updates.traces:
            indices = [index for index in trace.rows if rows[index].is_trained]
            totals = Totals(
                denominator=recomputed_loss_denominator([rows[index] for index in indices], rules)
            )
            for index in indices:
                logprobs, entropy = trace.tokens[index]
                ref = None if ref_logprobs is None else ref_logprobs[index]
                old = self._policies.all_old_logprobs[index]
                row_loss(rows[index], logprobs, entropy, old, ref, rules, totals)
            updates.append(totals.update(rules))
        return update_means(updates)[0]

    def _candidate_reference(self, candidate: CandidateCause) -> list[Tensor] | None:
        if candidate.reference == "policy":
            return self._policies.all_old_logprobs
        return self._policies.ref_logprobs

    def _estimated_change_distance(self, candidate: CandidateCause) -> float:
        """Return the distance of the change that Adam makes of the gradients by the settings."""
        model = self._scratch_model()
        parameters = trained_parameters(model)
        loses_moments = candidate.loses_moments
        adam = Adam(
            parameters,
            None if loses_moments else self._inputs.moments,
            0 if loses_moments else self._inputs.num_updates,
        )
        rules = replace(self._inputs.adam_rules(self._norms), **dict(candidate.adam))
        for index, trace in enumerate(self._updates.traces):
            if rules.moment_reset:
                adam.forget()
            adam.step(trace.gradients, rules, index)
        change, _ = self._after.change_distance(model, adam)
        return max(change or 0.0, self._after.moment_distance(adam) or 0.0)
