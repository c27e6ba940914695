"""Tries what an engine with `push.fp8` may have in place of the newest weights.

They may be the newest 8-bit values with the block scales of an earlier push, weights of an earlier
version, or weights that are not quantized.

The engine's bfloat16 moves log-probabilities as much as such weights do, but otherwise. Each
candidate has an effect e on every token's log-probability, on which the engine's differences d are
regressed: c = (d · e) / (e · e), with the standard error |d - c e| / (|e| √tokens). It is near 1
for the right candidate, and near 0 for an engine with the newest weights. Of those near 1 the one
that leaves the smallest mean |d - e| is named, where that is a good deal smaller than |d|: what
is the same in all tokens, as rounding of weights, is not in the standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from megatron_r1.why.checks.engine_causes import DepartureCause, older_weights
from megatron_r1.why.checks.engine_gaps import EngineGaps, ExplainedEngine, mean_gap
from megatron_r1.why.checks.expert_causes import MAX_CANDIDATE_EXPERTS, experts_by_gap
from megatron_r1.why.checks.tensor_causes import MAX_TRIED
from megatron_r1.why.checks.tensor_groups import layer_parts, whole_groups

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_r1.why.policy.fp8_engines import FP8EngineLogprobs

TRIED_TOKENS = 2048
"""Sampled tokens of an engine that differences are regressed over."""
MIN_STANDARD_ERRORS, MAX_COEFFICIENT_ERROR, MAX_RESIDUAL_FRACTION = 8.0, 0.25, 0.85
"""An effect is there if its coefficient is this many standard errors from 0 and at most this far
from 1, and if without it the mean |difference| is at most this fraction of what it is."""
MIN_STANDARD_ERRORS_FOR_PARTS = 2.0
"""Parts of the weights are tried where the coefficient of all weights is this many standard errors
from 0."""
FAULT = "FP8 scales of the push before"
SCALE_REMEDY = (
    "push.fp8: the push of the block scales (*_scale_inv) to {engine}, which engines convert apart "
    "from the values: logs/{engine}*.log, push/* in metrics.jsonl (docs/push.md)"
)
Kind = Literal["scales", "weights", "plain"]


class FP8Candidate(NamedTuple):
    """What an engine may have in place of the newest weights.

    Attributes:
        kind: scales of a version, weights of one, or the newest weights without quantization.
        version: the number of steps that the weights were trained for.
        noun: the tensors; "": all."""

    kind: Kind
    version: int
    noun: str = ""


class Fit(NamedTuple):
    """An effect in an engine's differences.

    Attributes:
        coefficient: c of the regression: the differences are c times the effect and noise.
        error: the standard error of c.
        residual: the mean |difference - effect| over the tokens.
        size: the mean |difference| over the tokens."""

    coefficient: float
    error: float
    residual: float
    size: float

    @property
    def evidence(self) -> float:
        """The coefficient in standard errors."""
        return self.coefficient / max(self.error, 1e-12)

    @property
    def holds(self) -> bool:
        """Whether the differences have the effect, once."""
        is_sure = self.coefficient > MIN_STANDARD_ERRORS * self.error
        is_once = abs(self.coefficient - 1) <= MAX_COEFFICIENT_ERROR
        return is_sure and is_once and self.residual <= MAX_RESIDUAL_FRACTION * self.size


def fit_effect(effect: np.ndarray, differences: np.ndarray) -> Fit:
    """Return how much of an effect is in differences.

    Args:
        effect: (tokens,).
        differences: (tokens,)."""
    size, residual = mean_gap([differences]), mean_gap([differences - effect])
    square = float(effect @ effect)
    if not square:
        return Fit(0.0, math.inf, residual, size)
    coefficient = float(differences @ effect) / square
    residual_norm = float(np.linalg.norm(differences - coefficient * effect))
    return Fit(coefficient, residual_norm / math.sqrt(square * len(effect)), residual, size)


def other_fp8_weights(gaps: EngineGaps) -> DepartureCause | None:
    """Try what engines with `push.fp8` may have in place of the newest weights."""
    from megatron_r1.why.policy.fp8_engines import FP8EngineLogprobs

    if not isinstance(gaps.policies, FP8EngineLogprobs):
        return None
    return FP8Search(gaps, gaps.policies).best_cause()


class FP8Search:
    """Looks for what an engine has in place of the newest weights.

    Args:
        gaps: the differences.
        policies: log-probabilities under weights as engines have them."""

    def __init__(self, gaps: EngineGaps, policies: FP8EngineLogprobs) -> None:
        self._gaps, self._policies = gaps, policies
        self._tried_sequences: list[int] = []

    def best_cause(self) -> DepartureCause | None:
        """Return the best candidate that holds; None where none does."""
        logprobs_by_candidate = dict(self._candidates_of_all_weights())
        engines = [
            (max(fit.evidence for fit in fits.values()), engine)
            for engine in self._gaps.means_by_name()
            if (fits := self._fits_to_engine(engine, logprobs_by_candidate))
        ]
        if not engines:
            return None
        evidence, engine = max(engines)
        fits = self._fits_to_engine(engine, logprobs_by_candidate)
        if evidence > MIN_STANDARD_ERRORS_FOR_PARTS:
            fits |= self._fits_of_parts()
        holding_fits = {candidate: fit for candidate, fit in fits.items() if fit.holds}
        if not holding_fits:
            return None
        best_candidate = min(holding_fits, key=lambda candidate: holding_fits[candidate].residual)
        return self._departure_cause(engine, best_candidate, holding_fits[best_candidate])

    def _candidates_of_all_weights(self) -> Iterator[tuple[FP8Candidate, list[np.ndarray]]]:
        """Yield candidates of all weights, with their log-probabilities by sequence."""
        policies, newest_version = self._policies, self._gaps.newest_version
        yield FP8Candidate("plain", newest_version), policies.trainer.old_logprobs
        versions = self._gaps.earlier_versions
        for version in versions[:1] if policies.models.is_streamed else versions:
            if (model := policies.models.model_with_scales_of_step(version)) is not None:
                yield FP8Candidate("scales", version), policies.logprobs_under(model)
            if (logprobs := policies.logprobs_after(version)) is not None:
                yield FP8Candidate("weights", version), logprobs

    def _fits_to_engine(
        self, engine: str, logprobs_by_candidate: Mapping[FP8Candidate, Sequence[np.ndarray]]
    ) -> dict[FP8Candidate, Fit]:
        """Return how well each candidate fits an engine, whose sequences are then the tried ones;
        nothing without any."""
        self._tried_sequences = self._gaps.largest_gaps(engine, TRIED_TOKENS)
        if not self._tried_sequences:
            return {}
        return {
            candidate: self._fit_of_logprobs([logprobs[index] for index in self._tried_sequences])
            for candidate, logprobs in logprobs_by_candidate.items()
        }

    def _fit_of_logprobs(self, logprobs: Sequence[np.ndarray]) -> Fit:
        """Return how well log-probabilities of the tried sequences fit."""
        old_logprobs = [self._policies.old_logprobs[index] for index in self._tried_sequences]
        effect = np.concatenate(logprobs) - np.concatenate(old_logprobs)
        return fit_effect(effect, self._tried_differences)

    @property
    def _tried_differences(self) -> np.ndarray:
        return np.concatenate([self._gaps.gaps[index] for index in self._tried_sequences])

    def _fits_of_parts(self) -> dict[FP8Candidate, Fit]:
        """Return how well candidates of a part of the weights fit the tried sequences."""
        from megatron_r1.why.policy.changed_weights import ChangedWeights
        from megatron_r1.why.policy.step_models import NotInMemory

        try:
            weights = ChangedWeights(self._policies)
        except NotInMemory:
            self._gaps.untried_causes.append("FP8 scales of one tensor")
            return {}
        newest_version = self._gaps.newest_version
        sequences = [self._policies.computed_sequences[index] for index in self._tried_sequences]
        fits = {}
        for version in sorted({max(0, newest_version - 1), 0} - {newest_version}, reverse=True):
            scaled_model = self._policies.models.model_with_scales_of_step(version)
            values_by_kind: dict[Kind, dict[str, Tensor] | None] = {
                "scales": None if scaled_model is None else weights.other_tensors(scaled_model),
                "weights": weights.version_tensors(version),
            }
            for kind, values in values_by_kind.items():
                parts = self._weight_parts(values or {}, weights.tensors)
                for noun, part_values in islice(parts, MAX_TRIED):
                    logprobs = weights.logprobs(part_values, sequences)
                    fits[FP8Candidate(kind, version, noun)] = self._fit_of_logprobs(logprobs)
        return fits

    def _weight_parts(
        self, values: Mapping[str, Tensor], newest_tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield parts of the weights with their other values: experts, then groups of tensors."""
        for gap in experts_by_gap(self._gaps)[:MAX_CANDIDATE_EXPERTS] if values else ():
            expert_values = {}
            for name in values:
                if name.startswith(f"{gap.layer}."):
                    expert_values[name] = newest_tensors[name].clone()
                    expert_values[name][gap.expert] = values[name][gap.expert]
            if expert_values:
                yield (
                    f"expert {gap.expert} of {gap.layer.removesuffix('.mlp.experts')}",
                    expert_values,
                )
        groups, layers = whole_groups(values)
        for layer, names in layers.items():
            groups |= layer_parts(layer, names) | {layer: names}
        for noun, names in groups.items():
            if len(names) < len(values):
                yield noun, {name: values[name] for name in names}

    def _departure_cause(self, engine: str, candidate: FP8Candidate, fit: Fit) -> DepartureCause:
        kind, version, noun = candidate
        newest_version, name = self._gaps.newest_version, engine or "engine"
        explained_engine = ExplainedEngine(fit.residual, fit.size, name)
        fit_text = (
            f"{explained_engine.gap_sizes}, the differences are {fit.coefficient:.2f} ± "
            f"{fit.error:.2f} times those that it makes"
        )
        remedy = SCALE_REMEDY.format(engine=name)
        if kind == "plain":
            return DepartureCause(
                f"{name} computes with weights that are not quantized: {fit_text}",
                "push.fp8: true has no effect on the engine: its quantization_config "
                "(rollout.vllm)",
            )
        if kind == "scales":
            fault = FAULT if version == newest_version - 1 else f"FP8 scales of version {version}"
            place = f" in {noun}" if noun else ""
            return DepartureCause(
                f"{fault}{place}: {name} computes with the 8-bit values of version "
                f"{newest_version} and the block scales of version {version}; {fit_text}",
                remedy,
            )
        if noun:
            return DepartureCause(
                f"{noun} in {name} is of version {version}, not {newest_version}; {fit_text}",
                remedy,
            )
        return older_weights(self._gaps, version, explained_engine)
