"""Recomputes a step's updates with transformers' model, as the settings say or with a candidate
cause in place, and keeps the results of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from megatron_r1.why.comparison import Comparison
from megatron_r1.why.policy.fp8_engines import FP8EngineLogprobs
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import StepModels
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.candidate_cause import CandidateCause
from megatron_r1.why.update.candidate_estimates import CandidateEstimates
from megatron_r1.why.update.checkpoint_after import CheckpointAfter
from megatron_r1.why.update.loss_formulas import Update, update_means
from megatron_r1.why.update.moment_fits import MomentFits
from megatron_r1.why.update.recomputed_token_advantages import with_token_advantages
from megatron_r1.why.update.run_differences import RunDifferences, find_run_differences
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.term_coefficients import MAX_ROUNDS, TermFit
from megatron_r1.why.update.term_gradients import TermGradients
from megatron_r1.why.update.update_inputs import UpdateInputs

MIN_CLIPPED_NORM_FACTOR = 1.001
"""A gradient was clipped by more than rounding where its norm is above this times
`optimizer.clip_grad`."""


@dataclass(frozen=True)
class RecomputedUpdates:
    """The recomputed updates of a step.

    Attributes:
        metrics: as metrics.jsonl has them, over the updates.
        terms: the magnitude of each term of the loss, mean over the updates.
        signed_terms: each term with its sign, mean over the updates.
        update_distance: |own - run's| / |run's change| of all parameters; None without a
            checkpoint after.
        by_parameter: by name, the same of each, largest first.
        moment_distance: |own - run's| / |run's| of Adam's first or second moments, the larger one,
            after the step; None where no checkpoint has them."""

    metrics: dict[str, float]
    terms: dict[str, float]
    signed_terms: dict[str, float]
    update_distance: float | None
    by_parameter: list[tuple[str, float]]
    moment_distance: float | None = None


def ignore_line(line: str) -> None:
    """Show nothing."""


class Recomputation:
    """Recomputes a recorded step: its updates, from its policies and their log-probabilities.

    Args:
        step: what the run recorded of it.
        memory: as of `StepModels`.
        show_progress: as the attribute.

    Attributes:
        models: the models of the step.
        policies: log-probabilities under its policies.
        inputs: what the updates are made of.
        checkpoint_after: what the checkpoint after the step has of the run's updates.
        searches_causes: whether updates that depart are recomputed with candidate causes: not where
            something before them departs, which may be why.
        show_progress: called with a line before what may take minutes.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(
        self,
        step: RecordedStep,
        memory: int | None = None,
        show_progress: Callable[[str], None] = ignore_line,
    ) -> None:
        self.step, self.show_progress = step, show_progress
        self._shown_departures: set[tuple[str, str]] = set()
        self.models = StepModels(step, memory)
        self.policies = StepLogprobs(self.models)
        self.inputs = UpdateInputs(self.policies)
        self.checkpoint_after = CheckpointAfter(self.inputs)
        self._fits = MomentFits(self.inputs, self.checkpoint_after, self._remake_updates)
        self.searches_causes = True

    def show_departures(self, comparisons: Sequence[Comparison]) -> None:
        """Show each departure once, also where a later check gives it another reason."""
        for comparison in comparisons:
            key = (comparison.family, comparison.name)
            if comparison.differs and key not in self._shown_departures:
                self._shown_departures.add(key)
                self.show_progress(f"{comparison.name} departs: {comparison.reason}")

    @cached_property
    def engine_policy(self) -> StepLogprobs:
        """Log-probabilities under the weights as engines have them, which `push.fp8` quantizes."""
        fp8 = self.step.run_config.push.fp8
        return FP8EngineLogprobs(self.policies) if fp8 else self.policies

    def run(
        self, candidate: CandidateCause, matches_record: Callable[[Mapping[str, float]], bool]
    ) -> RecomputedUpdates | None:
        """Make the step's updates with a candidate cause in place; return None where their metrics
        are not those that were recorded, which is known before the last gradient.

        Args:
            candidate: what is computed otherwise.
            matches_record: whether metrics, without the gradient's norm, may be the recorded ones.

        Raises:
            CannotRecompute: the step's updates cannot be made here."""
        return self._make_updates(
            candidate,
            model=None if candidate.unties_head else self._scratch_model(),
            matches_record=matches_record,
        )[1]

    def _make_updates(
        self,
        candidate: CandidateCause,
        norms: tuple[float, ...] | None = None,
        gradients: TermGradients | None = None,
        model: Any = None,
        matches_record: Callable[[Mapping[str, float]], bool] | None = None,
    ) -> tuple[StepUpdates, RecomputedUpdates | None]:
        """Make the updates with a candidate cause in place."""
        self.inputs.check_updates()
        rows = self.inputs.candidate_rows(candidate)
        loss = replace(self.inputs.loss_rules(), **dict(candidate.loss))
        old_logprobs, ref_logprobs = self.inputs.old_and_ref_logprobs(candidate, rows, loss)
        rows = with_token_advantages(self.step, rows, old_logprobs, ref_logprobs)
        if model is None:
            model = copy.deepcopy(self.inputs.trained_model)
        if candidate.unties_head:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        updates = StepUpdates(
            model,
            None if candidate.loses_moments else self.inputs.candidate_moments(candidate),
            0 if candidate.loses_moments else self.inputs.num_updates,
            rows,
            old_logprobs,
            ref_logprobs,
            self.step.run_config.model.expert_bias_update_rate,
            None if candidate.unties_head else self.inputs.first_update,
        )
        adam = replace(
            self.inputs.adam_rules(self._fits.norms if norms is None else norms),
            **dict(candidate.adam),
        )
        order = self.inputs.update_rows(candidate, rows)
        step_updates = updates.run(
            order,
            loss,
            adam,
            frozenset(candidate.rows_without_gradient),
            gradients,
            is_known=candidate.has_loss_of_settings,
            is_possible=None if matches_record is None else partial(_means_satisfy, matches_record),
        )
        if len(step_updates) < len(order):
            return updates, None
        metrics, terms = update_means(step_updates)
        signed_terms = {
            name: sum(update.terms[name] for update in step_updates) / len(step_updates)
            for name in step_updates[0].terms
        }
        # The norm of a gradient is not known that was not clipped, or whose update was not made.
        is_unclipped = (
            adam.norms is not None and min(adam.norms) < MIN_CLIPPED_NORM_FACTOR * adam.clip_grad
        )
        if is_unclipped or adam.skipped_updates:
            del metrics["grad_norm"]
        change, by_parameter = self.checkpoint_after.change_distance(model, updates.adam)
        return updates, RecomputedUpdates(
            metrics,
            terms,
            signed_terms,
            change,
            by_parameter,
            self.checkpoint_after.moment_distance(updates.adam),
        )

    def _scratch_model(self) -> Any:
        """Return a copy of the trained model, the same one each time, with the values of before."""
        scratch = self._copied_model
        with torch.no_grad():
            for value, before in zip(
                itertools.chain(scratch.parameters(), scratch.buffers()),
                itertools.chain(
                    self.inputs.trained_model.parameters(), self.inputs.trained_model.buffers()
                ),
                strict=True,
            ):
                value.copy_(before)
        return scratch

    @cached_property
    def _copied_model(self) -> Any:
        return copy.deepcopy(self.inputs.trained_model)

    @cached_property
    def _base_updates(self) -> tuple[StepUpdates, RecomputedUpdates]:
        self.inputs.check_updates()
        gradients = None if self._fits.terms_reason else self._fits.term_gradients
        updates, recomputed = self._make_updates(CandidateCause(""), gradients=gradients)
        assert recomputed is not None, "all updates are made"
        return updates, recomputed

    @property
    def base(self) -> RecomputedUpdates:
        """The updates as the settings say."""
        return self._base_updates[1]

    def _remake_updates(
        self, norms: tuple[float, ...] | None, gradients: TermGradients | None
    ) -> StepUpdates:
        """Make the updates as the settings say once more, on a copy that is changed."""
        return self._make_updates(CandidateCause(""), norms, gradients, self._scratch_model())[0]

    @cached_property
    def term_fit(self) -> TermFit:
        """The run's gradient as a combination of the terms' of its loss.

        Raises:
            CannotRecompute: the gradients are not known."""
        return self._fits.term_fit(
            lambda: self.base.metrics, MAX_ROUNDS if self.searches_causes else 0
        )

    @property
    def fitted_clip(self) -> float | None:
        """The norm to which the run clipped its gradients, by its first moments; None where these
        say none."""
        return self._fits.fitted_clip

    @cached_property
    def run_differences(self) -> RunDifferences:
        """What the checkpoint after the step says of how the run's updates differ from `base`."""
        updates, base = self._base_updates
        return find_run_differences(
            self.inputs,
            self.checkpoint_after,
            updates,
            base.metrics.get("grad_norm", 0.0),
            base.signed_terms,
        )

    @cached_property
    def estimates(self) -> CandidateEstimates:
        """How far updates with a candidate cause would be from what was recorded."""
        updates, base = self._base_updates
        return CandidateEstimates(
            self.inputs,
            self.checkpoint_after,
            updates,
            base.metrics,
            self._fits.norms,
            self._scratch_model,
        )


def _means_satisfy(
    matches_record: Callable[[Mapping[str, float]], bool], updates: Sequence[Update]
) -> bool:
    return matches_record(update_means(updates)[0])
