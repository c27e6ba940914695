"""A recorded step's updates made again with transformers' model, as the settings say or with one
thing substituted, and how far they are from the run's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_r1.why.comparison import ROUNDING_BY_DTYPE, CannotRecompute
from megatron_r1.why.policy import checkpoint_model, model_distance
from megatron_r1.why.policy.adapters import trained_parameters
from megatron_r1.why.policy.fp8_engines import FP8EngineLogprobs
from megatron_r1.why.policy.policy_logprobs import PolicyLogprobs
from megatron_r1.why.policy.token_logprobs import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.adam import Adam, Moments
from megatron_r1.why.update.evidence import Evidence, nearest_multiple, without_gradient
from megatron_r1.why.update.first_update import FirstUpdate, first_update
from megatron_r1.why.update.gradient_norms import fit_clip, fit_norms
from megatron_r1.why.update.loss_formulas import LossRules, Totals, Update, denominator, row_loss
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.substitution import Substitution
from megatron_r1.why.update.term_coefficients import MAX_ROUNDS, FirstMoments, TermFit, fit_run
from megatron_r1.why.update.term_gradients import TermGradients
from megatron_r1.why.update.token_advantages import with_token_advantages
from megatron_r1.why.update.update_inputs import UpdateInputs

MIN_CLIPPED_NORM_FACTOR = 1.001
"""A gradient was clipped by more than rounding where its norm is above this times
`optimizer.clip_grad`."""
UNKNOWN_DISTANCE = 1.05
"""The distance of a substitution that cannot be estimated, which is tried after those that seem to
explain the whole departure (nearly 1) and before all others."""


@dataclass(frozen=True)
class RecomputedUpdates:
    """The updates of a step, made again.

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


_Fitted = TypeVar("_Fitted")


class Recomputation:
    """Recomputes a recorded step: its updates, from its policies and their log-probabilities.

    Args:
        step: the step.
        memory: as of `PolicyLogprobs`.

    Attributes:
        policies: log-probabilities under the policies of the step.
        inputs: what the updates are made of.
        searches_causes: whether updates that depart are made again with substitutions: not where
            something before them departs, which may be why.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, step: RecordedStep, memory: int | None = None) -> None:
        self.step = step
        self.policies = PolicyLogprobs(step, memory)
        self.inputs = UpdateInputs(self.policies)
        self.searches_causes = True

    @cached_property
    def engine_policy(self) -> PolicyLogprobs:
        """Log-probabilities under the weights as engines have them, which `push.fp8` quantizes."""
        fp8 = self.step.run_config.push.fp8
        return FP8EngineLogprobs(self.policies) if fp8 else self.policies

    def run(
        self, substitution: Substitution, is_recorded: Callable[[Mapping[str, float]], bool]
    ) -> RecomputedUpdates | None:
        """Make the step's updates with one thing substituted; return None where their metrics are
        not those that were recorded, which is known before the last gradient.

        Args:
            substitution: what is substituted.
            is_recorded: whether metrics, without the gradient's norm, may be the recorded ones.

        Raises:
            CannotRecompute: the step's updates cannot be made here."""
        return self._make_updates(
            substitution,
            model=None if substitution.unties_head else self._scratch_model(),
            is_recorded=is_recorded,
        )[1]

    def _make_updates(
        self,
        substitution: Substitution,
        norms: tuple[float, ...] | None = None,
        gradients: TermGradients | None = None,
        model: Any = None,
        is_recorded: Callable[[Mapping[str, float]], bool] | None = None,
    ) -> tuple[StepUpdates, RecomputedUpdates | None]:
        """Make the updates with one thing substituted.

        Args:
            substitution: what is substituted.
            norms: the norms of the whole gradients; None: those that fit the run.
            gradients: where the gradients of the terms are collected; None: nowhere.
            model: the policy before the step, which is changed; None: a copy that stays.
            is_recorded: as of `run`; None: all updates are made."""
        self.inputs.check_updates()
        rows = self.inputs.substituted_rows(substitution)
        loss = replace(self.inputs.loss_rules(), **dict(substitution.loss))
        old_logprobs, ref_logprobs = self.inputs.old_and_ref_logprobs(substitution, rows, loss)
        rows = with_token_advantages(self.step, rows, old_logprobs, ref_logprobs)
        if model is None:
            model = copy.deepcopy(self.inputs.trained_model)
        if substitution.unties_head:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        updates = StepUpdates(
            model,
            None if substitution.loses_moments else self.inputs.substituted_moments(substitution),
            0 if substitution.loses_moments else self.inputs.num_updates,
            rows,
            old_logprobs,
            ref_logprobs,
            self.step.run_config.model.expert_bias_update_rate,
            None if substitution.unties_head else self._first_update,
        )
        adam = replace(
            self.inputs.adam_rules(self._norms if norms is None else norms),
            **dict(substitution.adam),
        )
        order = self.inputs.update_rows(substitution, rows)
        step_updates = updates.run(
            order,
            loss,
            adam,
            frozenset(substitution.rows_without_gradient),
            gradients,
            is_known=substitution.has_loss_of_settings,
            is_possible=None if is_recorded is None else partial(_means_satisfy, is_recorded),
        )
        if len(step_updates) < len(order):
            return updates, None
        metrics, terms = _means(step_updates)
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
        change, by_parameter = self._compare(model, updates.adam)
        return updates, RecomputedUpdates(
            metrics, terms, signed_terms, change, by_parameter, self._moment_distance(updates.adam)
        )

    @cached_property
    def _first_update(self) -> FirstUpdate | None:
        return first_update(
            self.inputs.trained_model,
            self.policies.rows,
            self.inputs.minibatches()[0],
            self.policies.num_parameters,
        )

    def _scratch_model(self) -> Any:
        """Return a copy of the trained model, the same one each time, with the values of before."""
        scratch = self._scratch
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
    def _scratch(self) -> Any:
        return copy.deepcopy(self.inputs.trained_model)

    @cached_property
    def _unsubstituted_updates(self) -> tuple[StepUpdates, RecomputedUpdates]:
        self.inputs.check_updates()
        gradients = None if self._terms_reason else self._term_gradients
        updates, recomputed = self._make_updates(Substitution(""), gradients=gradients)
        assert recomputed is not None, "all updates are made"
        return updates, recomputed

    @cached_property
    def _terms_reason(self) -> str:
        """Why the gradient of each term is not computed; "" where it is."""
        moments = self.step.config.optimizer.moments
        if self._first_moments_after is None:
            return f"no checkpoint of step {self.step.step} has Adam's moments"
        if moments != "float32":
            return f"optimizer.moments: {moments}, from which no gradient can be taken back"
        num_terms = len(self.inputs.loss_terms)
        if not num_terms:
            return "no response is trained on"
        num_values = sum(values.numel() for values in self._first_moments_after.values())
        copies_by_term = 4 if self._first_update is None else 5
        num_bytes = 4 * (copies_by_term * num_terms + 1) * num_values
        free_bytes = self.policies.free_bytes
        if num_bytes > free_bytes:
            return (
                f"the gradients of {num_terms} terms need {num_bytes / 1e9:.0f} GB, "
                f"{free_bytes / 1e9:.0f} GB are free"
            )
        return ""

    @cached_property
    def _term_gradients(self) -> TermGradients:
        return TermGradients(self.inputs.loss_terms)

    @cached_property
    def term_fit(self) -> TermFit:
        """The run's gradient as a combination of the terms' of its loss.

        Raises:
            CannotRecompute: the gradients are not known."""
        self.inputs.check_updates()
        if self._terms_reason or self._first_moments_after is None:
            raise CannotRecompute(self._terms_reason)
        base, settings = self.base, self.step.config.optimizer
        logged_norm = self.step.line.get("grad_norm")
        norm = (
            logged_norm
            if isinstance(logged_norm, int | float)
            else base.metrics.get("grad_norm", 0.0)
        )
        return fit_run(
            self._term_gradients,
            self._remade_terms,
            FirstMoments(
                self.inputs.moments[0] if self.inputs.moments else {},
                self._first_moments_after,
                settings.beta1**self.step.config.rl.minibatches,
            ),
            ROUNDING_BY_DTYPE[self.step.run_config.model.dtype],
            float(norm),
            MAX_ROUNDS if self.searches_causes else 0,
        )

    def _remade_terms(
        self, coefficients: Mapping[str, float], norms: tuple[float, ...]
    ) -> TermGradients:
        """Return the terms' gradients in updates that are made with them.

        Args:
            coefficients: how often each term is added.
            norms: the norm of each update's gradient, unless a part of it is not computed here."""
        gradients = TermGradients(self.inputs.loss_terms, coefficients)
        self._make_updates(
            Substitution(""),
            None if self.inputs.trains_mtp_layers else norms,
            gradients,
            self._scratch_model(),
        )
        return gradients

    @property
    def base(self) -> RecomputedUpdates:
        """The updates as the settings say."""
        return self._unsubstituted_updates[1]

    @cached_property
    def _norms(self) -> tuple[float, ...] | None:
        """The norms of whole gradients, where parts of them are not computed here: those with which
        clipping gives the run's first moments from the gradients that are.

        Raises:
            CannotRecompute: there is no checkpoint after the step."""
        if not self.inputs.trains_mtp_layers:
            return None
        if (norms := self._fit(fit_norms)) is None:
            raise CannotRecompute("model.mtp: train, and no checkpoint says how gradients were cut")
        return norms

    @cached_property
    def fitted_clip(self) -> float | None:
        """The norm to which the run clipped its gradients, by its first moments; None where these
        say none."""
        return None if self.inputs.trains_mtp_layers else self._fit(fit_clip)

    def _fit(self, fit: Callable[..., _Fitted]) -> _Fitted | None:
        """Return what a function of `gradient_norms` finds; None without the run's moments or
        the norm that it logs."""
        logged_norm = self.step.line.get("grad_norm")
        if self._first_moments_after is None or not isinstance(logged_norm, int | float):
            return None
        return fit(
            lambda norms: (
                self._make_updates(Substitution(""), norms, model=self._scratch_model())[0].traces
            ),
            (float(logged_norm),) * self.step.config.rl.minibatches,
            self.inputs.moments[0] if self.inputs.moments else {},
            self._first_moments_after,
            self.step.config.optimizer,
        )

    @cached_property
    def evidence(self) -> Evidence:
        """What the checkpoint after the step says of how the run's updates differ from `base`."""
        after = self._model_after
        base_evidence: dict[str, Any] = {
            "norm": self.base.metrics.get("grad_norm", 0.0),
            "terms": self.base.signed_terms,
        }
        if after is None:
            return Evidence(**base_evidence)
        begin, last = trained_parameters(self.inputs.trained_model), trained_parameters(after)
        updated = trained_parameters(self._unsubstituted_updates[0].model)
        changes = [(last[name] - value, updated[name] - value) for name, value in begin.items()]
        if self._first_moments_after is None:
            return Evidence(nearest_multiple(changes), **base_evidence)
        decay = self.step.config.optimizer.beta1**self.step.config.rl.minibatches
        before = self.inputs.moments[0] if self.inputs.moments else {}
        gradients = {
            name: tuple(
                moments[name] - decay * before.get(name, torch.zeros(()))
                for moments in (
                    self._first_moments_after,
                    self._unsubstituted_updates[0].adam.first_moments,
                )
            )
            for name in begin
        }
        return Evidence(
            nearest_multiple(changes),
            nearest_multiple(list(gradients.values())),
            without_gradient(gradients),
            **base_evidence,
        )

    def estimate(self, substitution: Substitution, logged_metrics: Mapping[str, Any]) -> float:
        """Return an estimate of how far the updates with a substitution would be from what was
        recorded: 1 near, 2 far. It takes log-probabilities and gradients from `base`.

        Args:
            substitution: what is substituted.
            logged_metrics: the step's line of metrics.jsonl."""
        if "temperature" in dict(substitution.loss):
            return UNKNOWN_DISTANCE
        if substitution.loss or substitution.advantages is not None:
            return self._estimated_loss_distance(substitution, logged_metrics)
        if not (substitution.adam or substitution.loses_moments):
            return UNKNOWN_DISTANCE
        if self._model_after is None:
            return 2.0
        return 1.0 + min(1.0, self._estimated_change_distance(substitution))

    def _estimated_loss_distance(
        self, substitution: Substitution, logged_metrics: Mapping[str, Any]
    ) -> float:
        """Return 1 plus how far the metrics of another loss or other advantages would be from the
        logged ones, relative to those of `base`; each metric counts with at most 1."""
        rows = self.inputs.substituted_rows(substitution)
        reference = self._substituted_reference(substitution)
        rows = with_token_advantages(self.step, rows, self.policies.all_old_logprobs, reference)
        if [row.is_trained for row in rows] != [row.is_trained for row in self.policies.rows]:
            return UNKNOWN_DISTANCE
        rules = replace(self.inputs.loss_rules(), **dict(substitution.loss))
        metrics = self._estimated_metrics(rows, reference, rules)
        gaps = []
        for name, base_value in self.base.metrics.items():
            value = logged_metrics.get(name)
            if name == "grad_norm" or name not in metrics or not isinstance(value, int | float):
                continue
            gap = abs(metrics[name] - float(value))
            gaps.append(min(1.0, gap / max(1e-9, abs(base_value - float(value)))))
        return 1.0 + sum(gaps) / max(1, len(gaps))

    def _estimated_metrics(
        self, rows: Sequence[TokenRow], ref_logprobs: Sequence[Tensor] | None, rules: LossRules
    ) -> dict[str, float]:
        """Return the metrics of a loss of the log-probabilities and entropies of `base`.

        Args:
            rows: the rows, with their advantages.
            ref_logprobs: their log-probabilities under the reference.
            rules: the loss."""
        updates = []
        for trace in self._unsubstituted_updates[0].traces:
            indices = [index for index in trace.rows if rows[index].is_trained]
            totals = Totals(denominator=denominator([rows[index] for index in indices], rules))
            for index in indices:
                logprobs, entropy = trace.tokens[index]
                ref = None if ref_logprobs is None else ref_logprobs[index]
                old = self.policies.all_old_logprobs[index]
                row_loss(rows[index], logprobs, entropy, old, ref, rules, totals)
            updates.append(totals.update(rules))
        return _means(updates)[0]

    def _substituted_reference(self, substitution: Substitution) -> list[Tensor] | None:
        if substitution.reference == "policy":
            return self.policies.all_old_logprobs
        return self.policies.reference_logprobs

    def _estimated_change_distance(self, substitution: Substitution) -> float:
        """Return the distance of the change that Adam makes of the gradients of `base`."""
        model = self._scratch_model()
        parameters = trained_parameters(model)
        loses_moments = substitution.loses_moments
        adam = Adam(
            parameters,
            None if loses_moments else self.inputs.moments,
            0 if loses_moments else self.inputs.num_updates,
        )
        rules = replace(self.inputs.adam_rules(self._norms), **dict(substitution.adam))
        for index, trace in enumerate(self._unsubstituted_updates[0].traces):
            if rules.moment_reset:
                adam.forget()
            adam.step(trace.gradients, rules, index)
        change, _ = self._compare(model, adam)
        return max(change or 0.0, self._moment_distance(adam) or 0.0)

    @cached_property
    def _model_after(self) -> Any:
        """The trained model after the step; None where no checkpoint has it."""
        after, dtype = self.step.checkpoint_after, self.step.run_config.model.dtype
        if after is None:
            return None
        return self.policies.model(
            after, "" if dtype == "float32" else f"{checkpoint_model.STATE_PREFIX}param."
        )

    @cached_property
    def _moments_after(self) -> tuple[Moments, Moments] | None:
        """Adam's moments after the step; None where no checkpoint has them."""
        after = self.step.checkpoint_after
        if after is None or not checkpoint_model.has_part(after, checkpoint_model.STATE_PREFIX):
            return None
        return self.inputs.moments_in(after)

    @property
    def _first_moments_after(self) -> Moments | None:
        return None if self._moments_after is None else self._moments_after[0]

    @torch.no_grad()
    def _moment_distance(self, adam: Adam) -> float | None:
        if self._moments_after is None:
            return None
        ratios = []
        for moment, run in zip(
            (adam.first_moments, adam.second_moments), self._moments_after, strict=True
        ):
            gap_square = sum(
                float((moment[name] - values).double().square().sum())
                for name, values in run.items()
            )
            square = sum(float(values.double().square().sum()) for values in run.values())
            ratios.append(_ratio(gap_square**0.5, square**0.5))
        return max(ratios)

    def _compare(self, model: Any, adam: Adam) -> tuple[float | None, list[tuple[str, float]]]:
        if self._model_after is None:
            return None, []
        distance = model_distance.distances(
            model, self._model_after, self.inputs.trained_model, adam.second_moments
        )
        total_gap = sum(gap**2 for gap, _ in distance.values()) ** 0.5
        total_change = sum(change**2 for _, change in distance.values()) ** 0.5
        by_name = {
            name: _ratio(gap, change) for name, (gap, change) in distance.items() if gap or change
        }
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        return _ratio(total_gap, total_change), ordered


def _ratio(gap: float, change: float) -> float:
    return gap / change if change else (0.0 if gap == 0 else float("inf"))


def _means_satisfy(
    is_recorded: Callable[[Mapping[str, float]], bool], updates: Sequence[Update]
) -> bool:
    return is_recorded(_means(updates)[0])


def _means(updates: Sequence[Update]) -> tuple[dict[str, float], dict[str, float]]:
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
