"""Tries whether an engine has tensors that are not the checkpoint's: stale or exchanged ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.why.checks.engine_causes import DepartureCause
from megatron_r1.why.checks.engine_gaps import EngineGaps, ExplainedEngine, mean_gap
from megatron_r1.why.checks.tensor_groups import layer_parts, tensor_exchanges, whole_groups

if TYPE_CHECKING:
    from torch import Tensor

TRIED_TOKENS = 512
"""Sampled tokens that a change of the weights is tried on, before it is tried on all."""
MAX_TRIED = 128
"""Groups of tensors of a version, and exchanges, that are tried."""
MAX_NAMED = 4
"""Groups that are named where several explain a departure as well as one another."""
TENSOR_REMEDY = "the push of that tensor (docs/push.md): its name and place in the engine's model"


def departing_tensor(gaps: EngineGaps) -> DepartureCause | None:
    """Try tensors of earlier versions, and simple exchanges."""
    means = {name: mean for name, mean in gaps.means_by_name().items() if mean > gaps.tolerance}
    if not means:
        return None
    tried_sequences = gaps.largest_gaps(max(means, key=lambda name: means[name]), TRIED_TOKENS)
    if not tried_sequences:
        return None
    search = TensorSearch(gaps, tried_sequences)
    return search.stale_tensors() or search.exchanged_tensors()


class TensorSearch:
    """Looks for the tensors that make an engine's log-probabilities others than the checkpoint's.

    Args:
        gaps: the differences.
        tried_sequences: the sequences that changes are tried on, all of the newest version."""

    def __init__(self, gaps: EngineGaps, tried_sequences: Sequence[int]) -> None:
        from megatron_r1.why.policy.changed_weights import ChangedWeights

        self._gaps = gaps
        self._weights = ChangedWeights(gaps.policies)
        self._sequences = [gaps.policies.computed_sequences[index] for index in tried_sequences]
        self._departure = np.concatenate([gaps.gaps[index] for index in tried_sequences])
        self._old_logprobs = np.concatenate(
            [gaps.policies.old_logprobs[index] for index in tried_sequences]
        )

    def stale_tensors(self) -> DepartureCause | None:
        """Try the tensors of the version before, and of the first."""
        newest_version = self._gaps.newest_version
        for version in sorted({max(0, newest_version - 1), 0} - {newest_version}, reverse=True):
            old_tensors = self._weights.version_tensors(version)
            if not old_tensors:
                continue
            groups = self._stale_groups(old_tensors)
            if not groups:
                continue
            nouns = list(groups)
            engine = self._explained_engine({name: old_tensors[name] for name in groups[nouns[0]]})
            if engine is not None:
                alternatives = "".join(f", or {noun}" for noun in nouns[1:MAX_NAMED])
                return DepartureCause(
                    f"{nouns[0]}{alternatives} in {engine.name} is of version {version}, "
                    f"not {newest_version}: {engine.gap_sizes}",
                    TENSOR_REMEDY,
                )
        return None

    def exchanged_tensors(self) -> DepartureCause | None:
        """Try exchanges of tensors."""
        for noun, sources in islice(tensor_exchanges(self._weights.tensors), MAX_TRIED):
            if self._mean_residual(self._effect_on_logprobs(sources)) > self._gaps.tolerance:
                continue
            if (engine := self._explained_engine(sources)) is not None:
                return DepartureCause(
                    f"{noun} are exchanged in {engine.name}: {engine.gap_sizes}", TENSOR_REMEDY
                )
        return None

    def _stale_groups(self, old_tensors: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """Return the groups of tensors, by noun, that explain the departure when they are older
        ones. The smallest comes first, of that which explains most and those that explain about as
        much.

        Parts of layers are tried in the order in which the older layers resemble the departure."""
        groups, layers = whole_groups(old_tensors)
        effects = {
            noun: self._effect_on_logprobs({name: old_tensors[name] for name in names})
            for noun, names in (groups | layers).items()
        }
        residuals = {noun: self._mean_residual(effect) for noun, effect in effects.items()}
        for layer in sorted(layers, key=lambda noun: -self._cosine_with_departure(effects[noun])):
            parts = layer_parts(layer, layers[layer])
            groups |= parts
            for noun, names in islice(parts.items(), max(0, MAX_TRIED - len(residuals))):
                residuals[noun] = self._mean_residual(
                    self._effect_on_logprobs({name: old_tensors[name] for name in names})
                )
        groups |= layers
        smallest_residual = min(residuals.values())
        limit = min(self._gaps.tolerance, max(2 * smallest_residual, self._gaps.tolerance / 16))
        explaining_nouns = [noun for noun in residuals if residuals[noun] <= limit]
        return {
            noun: groups[noun]
            for noun in sorted(explaining_nouns, key=lambda noun: len(groups[noun]))
        }

    def _cosine_with_departure(self, effect: np.ndarray) -> float:
        """Return the cosine of an effect with the departure, 0 for no effect."""
        norms = np.linalg.norm(effect) * np.linalg.norm(self._departure)
        return float(effect @ self._departure / norms) if norms else 0.0

    def _effect_on_logprobs(self, values: dict[str, Tensor]) -> np.ndarray:
        """Return how much changed tensors move the log-probabilities of the tried tokens."""
        return np.concatenate(self._weights.logprobs(values, self._sequences)) - self._old_logprobs

    def _mean_residual(self, effect: np.ndarray) -> float:
        """Return the mean |difference| that an effect leaves of the departure."""
        return mean_gap([self._departure - effect])

    def _explained_engine(self, values: dict[str, Tensor]) -> ExplainedEngine | None:
        """Return the engine whose tokens, all of them, changed tensors explain."""
        computed_sequences = self._gaps.policies.computed_sequences
        return self._gaps.explained_engine(self._weights.logprobs(values, computed_sequences))
