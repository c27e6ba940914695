"""Estimates with confidence intervals: pass@1 and pass@k.

Per question first, then over questions. The questions are a random sample of all possible ones; the
samples of one question are not independent. So every interval resamples whole questions (a cluster
bootstrap), and a question's weight does not depend on its number of samples."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
MAX_DRAWS = 40_000_000
"""The most questions drawn in all resamples together. So a benchmark of 14,042 questions, MMLU, has
fewer resamples; its means are close to normal anyway."""
MIN_RESAMPLES = 1_000
CHUNK_DRAWS = 4_000_000
NUM_SUBSETS = 100
"""Upper limit of the subsets that cons@m is averaged over, for m below the number of samples."""


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95% interval, which a single question does not have."""

    value: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | None]:
        """Return value and interval as the numbers of a result file."""
        return {"value": self.value, "low": self.low, "high": self.high}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate, from n >= k samples, that at least one of k is right.

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1 .. n} (1 - k/i)
    for n samples of which c are right (Chen et al. 2021, arXiv 2107.03374, eq. 1 and figure 3). The
    product has no binomial coefficients that could overflow. k = 1 gives c/n.

    Args:
        num_samples: n.
        num_correct: c.
        k: how many of the samples count."""
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be within 0…{num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs between 1 and {num_samples} (the samples) for k")
    if num_samples - num_correct < k:
        return 1.0
    factors = 1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(factors))


def estimate_mean(per_question: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean over questions and its percentile bootstrap interval.

    Args:
        per_question: [questions], any unit.
        seed: the seed of the resampling; the same seed gives the same interval. Equal values give
            an interval of width 0, which does not mean that other questions would give the same
            (docs/evaluation.md).
    """
    values = np.asarray(per_question, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a mean over questions needs at least one, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"question {int(np.argmin(np.isfinite(values)))} has no finite value")
    if (values == values[0]).all():
        value = float(values[0])
        return Estimate(value, value, value) if len(values) > 1 else Estimate(value, None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(_resampled_means(values, seed), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Return the means, [resamples], of len(values) values drawn with replacement."""
    num_questions = len(values)
    num_resamples = max(MIN_RESAMPLES, min(NUM_RESAMPLES, MAX_DRAWS // num_questions))
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_DRAWS // num_questions)
    means = []
    for start in range(0, num_resamples, chunk):
        shape = (min(chunk, num_resamples - start), num_questions)
        means.append(values[generator.integers(num_questions, size=shape)].mean(axis=1))
    return np.concatenate(means)


def index_subsets(num_samples: int, size: int, seed: int) -> list[tuple[int, ...]]:
    """Return sets of `size` ascending sample indices: all, or `NUM_SUBSETS` random ones of many.
    The vote of m out of n samples is the mean over these; m = n gives the whole set.

    Args:
        num_samples: the number of samples of a question.
        size: the number of indices in a set.
        seed: the seed of the draws, where not all sets are returned.
    """
    if math.comb(num_samples, size) <= NUM_SUBSETS:
        return list(itertools.combinations(range(num_samples), size))
    generator = np.random.default_rng(seed)
    draws = (generator.choice(num_samples, size, replace=False) for _ in range(NUM_SUBSETS))
    return [tuple(np.sort(draw).tolist()) for draw in draws]


def powers_up_to(num_samples: int) -> list[int]:
    """Return 1, 2, 4, … and `num_samples`: the k of pass@k and cons@k that are reported."""
    return [*(2**i for i in range((num_samples - 1).bit_length())), num_samples]
