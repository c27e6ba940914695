"""Computes the differences of the engines' log-probabilities from transformers', token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_r1.reporting.formatting import format_number
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.policy.changed_parts import ChangedPartLogprobs
    from megatron_r1.why.policy.step_logprobs import StepLogprobs

MAX_UNEXPLAINED_FRACTION = 0.5
"""The largest ratio of the distance with other log-probabilities to the distance without them, at
which they explain a difference. What is left has to be within rounding as well."""
MAX_VERSIONS_BEFORE = 4
"""Versions before the newest whose weights are tried, where their checkpoints are kept."""
POSITION_BINS = 40


class ExplainedEngine(NamedTuple):
    """An engine that other log-probabilities are nearer to than those of the checkpoint.

    Attributes:
        mean_gap: the mean |difference| of its tokens from the other log-probabilities.
        unexplained_gap: the same from those of the checkpoint.
        name: the engine's; "engine" where the log names none."""

    mean_gap: float
    unexplained_gap: float
    name: str

    @property
    def gap_sizes(self) -> str:
        """Both means, as text."""
        return (
            f"mean |Δ| {format_number(self.mean_gap)} against {format_number(self.unexplained_gap)}"
        )


class EngineGaps:
    """Differences of engines' log-probabilities from transformers', token by token.

    Args:
        step: what the run recorded of it.
        policies: its log-probabilities by transformers, under the weights that engines have.

    Attributes:
        sequences: those that are compared.
        engines: the engine of each.
        gaps: (sampled tokens,) each: the engine's log-probability less transformers', under the
            weights of the version that the engine had; NaN where these are not kept.
        tolerance: the largest mean |difference| that is rounding.
        untried_causes: causes that were not tried, as they need the whole model in memory."""

    def __init__(self, step: RecordedStep, policies: StepLogprobs) -> None:
        self.step, self.policies = step, policies
        self.sequences = [policies.models.sequences[index] for index in policies.computed_sequences]
        self._is_newest = [sequence.versions == self.newest_version for sequence in self.sequences]
        self.engines = [
            step.responses[sequence.response].response.engine for sequence in self.sequences
        ]
        self.gaps = self.gaps_from(policies.old_logprobs)
        # Tokens of earlier versions are an earlier policy's.
        versions = {int(v) for sequence in self.sequences for v in np.unique(sequence.versions)}
        for version in sorted(versions - {self.newest_version}):
            logprobs = policies.logprobs_after(version)
            if logprobs is not None:
                self._fill_version_gaps(version, logprobs)
        self.tolerance = ROUNDING_BY_DTYPE[step.run_config.rollout.dtype]
        self.untried_causes: list[str] = []

    @property
    def newest_version(self) -> int:
        """The version of the weights that the step trains."""
        return self.step.step - 1

    @property
    def earlier_versions(self) -> list[int]:
        """Versions before the one that the step trains. Some of their checkpoints may be kept."""
        first = max(0, self.newest_version - MAX_VERSIONS_BEFORE)
        return sorted({0, *range(first, self.newest_version)} - {self.newest_version}, reverse=True)

    @cached_property
    def changed_parts(self) -> ChangedPartLogprobs:
        """Log-probabilities under the newest weights with a part of them changed."""
        from megatron_r1.why.policy.changed_parts import ChangedPartLogprobs

        return ChangedPartLogprobs(self.policies)

    @cached_property
    def distance(self) -> float:
        """The mean |difference| of all tokens; NaN where no checkpoint of theirs is kept."""
        return mean_gap(self.gaps)

    def gaps_from(self, logprobs_of_sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the differences from other log-probabilities: of the newest version's tokens, NaN
        of the others.

        Args:
            logprobs_of_sequences: (sampled tokens,) each."""
        return [
            np.where(is_newest, sequence.logprobs - logprobs, np.nan)
            for sequence, logprobs, is_newest in zip(
                self.sequences, logprobs_of_sequences, self._is_newest, strict=True
            )
        ]

    def _fill_version_gaps(self, version: int, logprobs_of_sequences: Sequence[np.ndarray]) -> None:
        """Put the differences of another version's tokens into `gaps`."""
        for gap, sequence, logprobs in zip(
            self.gaps, self.sequences, logprobs_of_sequences, strict=True
        ):
            is_version = sequence.versions == version
            gap[is_version] = (sequence.logprobs - logprobs)[is_version]

    def position_means(self) -> tuple[list[float], list[float]]:
        """Return positions in the response, and the mean |difference| around each."""
        longest = max((len(gap) for gap in self.gaps), default=0)
        edges = np.unique(np.linspace(0, longest, min(POSITION_BINS, longest) + 1).astype(int))
        positions, values = [], []
        for first, end in pairwise(edges):
            mean = mean_gap([gap[first:end] for gap in self.gaps])
            if not math.isnan(mean):
                positions.append(float(first + end - 1) / 2)
                values.append(mean)
        return positions, values

    def engine_means(self) -> dict[str, float]:
        """Return the mean |difference| of each engine's tokens; NaN for one without any."""
        return {name or "not named": mean for name, mean in self.means_by_name().items()}

    def means_by_name(self) -> dict[str, float]:
        """Return the mean |difference| by the engine's name in the log; "" where it has none."""
        return {
            name: mean_gap(self._engine_gaps(name, self.gaps)) for name in sorted(set(self.engines))
        }

    def largest_gaps(self, engine: str, num_tokens: int) -> list[int]:
        """Return the sequences of an engine with the largest mean |difference|, all of the newest
        version, as many as have a number of tokens.

        Args:
            engine: its name.
            num_tokens: the number; fewer where there are no more."""
        indices = [
            index
            for index, (name, is_newest, gap) in enumerate(
                zip(self.engines, self._is_newest, self.gaps, strict=True)
            )
            if name == engine and is_newest.all() and len(gap)
        ]
        indices.sort(key=lambda index: -mean_gap([self.gaps[index]]))
        totals = np.cumsum([len(self.gaps[index]) for index in indices])
        return indices[: int((totals < num_tokens).sum()) + 1]

    def departing_engine(self) -> str | None:
        """Return the engine that alone is beyond the tolerance, where others are not."""
        means = {name: mean for name, mean in self.engine_means().items() if not math.isnan(mean)}
        departing = [name for name, mean in means.items() if mean > self.tolerance]
        return departing[0] if len(departing) == 1 and len(means) > 1 else None

    def explained_engine(
        self, logprobs_of_sequences: Sequence[np.ndarray]
    ) -> ExplainedEngine | None:
        """Return the first engine whose differences other log-probabilities explain; None where
        they explain no engine's.

        Args:
            logprobs_of_sequences: (sampled tokens,) each."""
        other_gaps = self.gaps_from(logprobs_of_sequences)
        for name, mean in self.means_by_name().items():
            other_mean = mean_gap(self._engine_gaps(name, other_gaps))
            is_explained = (
                other_mean <= self.tolerance and other_mean < MAX_UNEXPLAINED_FRACTION * mean
            )
            if mean > self.tolerance / 16 and is_explained:
                return ExplainedEngine(other_mean, mean, name or "engine")
        return None

    def stale_version(
        self, logprobs_of_version: Callable[[int], Sequence[np.ndarray] | None]
    ) -> tuple[int, ExplainedEngine] | None:
        """Return the earlier version whose log-probabilities explain an engine's differences best,
        and the engine; None where none explains any.

        Args:
            logprobs_of_version: returns (sampled tokens,) of each sequence by the version of some
                weights; None where these are not kept."""
        causes = [
            (engine.mean_gap, version, engine)
            for version in self.earlier_versions
            if (logprobs := logprobs_of_version(version)) is not None
            and (engine := self.explained_engine(logprobs)) is not None
        ]
        return min(causes)[1:] if causes else None

    def _engine_gaps(self, name: str, gaps: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [gap for gap, engine in zip(gaps, self.engines, strict=True) if engine == name]


def mean_gap(gaps: Sequence[np.ndarray]) -> float:
    """Return the mean |difference| of tokens, those without one left out; NaN where none has one.

    Args:
        gaps: (sampled tokens,) each."""
    differences = np.abs(np.concatenate(gaps)) if gaps else np.empty(0)
    differences = differences[~np.isnan(differences)]
    return float(differences.mean()) if len(differences) else math.nan
