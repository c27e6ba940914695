"""Estimates with confidence intervals: of samples, of pairs of responses, and of a reward model's
scores.

**pass@1, pass@k**: per question first, then over questions. The questions are a random sample of
all possible ones; the samples of one question are not independent. So every interval resamples
whole questions (a cluster bootstrap), and all questions have the same weight, whatever their
number of samples.

**Win rates** against another model's responses: as judged, and at equal length. Judges prefer
longer responses. AlpacaEval 2 (Dubois et al., arXiv 2404.04475, section 3) therefore fits the
preferences y in [0, 1] by logistic regression on the difference of lengths in characters,

    P(preferred) = sigmoid(theta + phi tanh((length - length of the reference) / s)),

s the standard deviation of the differences, and reports what it predicts at equal length:
sigmoid(theta). Two parts of AlpacaEval's own fit are missing: each instruction's difficulty, which
is fitted to a leaderboard of models, and the L1 penalty chosen by cross-validation, in whose place
theta and phi have a Gaussian prior of standard deviation 5. It matters only where the preferences
alone leave them unbounded.

**A reward model's scores** on held-out rows: accuracy, margin and calibration."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from r1_grading.reading import Part, response_part

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


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate, from n >= k samples, that at least one of k is right.

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1 .. n} (1 - k/i)
    for n samples of which c are right (Chen et al. 2021, arXiv 2107.03374, eq. 1 and figure 3). The
    product has no binomial coefficients that could overflow. k = 1 gives c/n.

    Args:
        num_samples: n.
        num_right: c.
        k: how many of the samples count."""
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"num_right must be within 0…{num_samples}, got {num_right}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs between 1 and {num_samples} (the samples) for k")
    if num_samples - num_right < k:
        return 1.0
    factors = 1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(factors))


def estimate(per_question: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
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


def subsets(num_samples: int, size: int, seed: int) -> list[tuple[int, ...]]:
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


PRIOR_PRECISION = 1 / 5.0**2
NUM_FITTED_RESAMPLES = 2_000
CHUNK_NUMBERS = 2_000_000
MAX_ITERATIONS = 100
LARGEST_STEP = 2.0
"""The limit of one of Newton's steps, in logits: from far away a whole step may overshoot."""

Comparisons = Sequence[Sequence[tuple[float, int]]]
"""[questions][samples] of (preference for the response, its length less the reference's)."""


def win_rates(questions: Comparisons, seed: int) -> dict[str, Estimate]:
    """Return win_rate and lc_win_rate, the length-controlled one, with 95% intervals that resample
    whole questions; each question has the same weight.

    Args:
        questions: the comparisons of each question.
        seed: the seed of the resampling.
    """
    raw = [sum(preference for preference, _ in samples) / len(samples) for samples in questions]
    weights = np.array([1 / len(samples) for samples in questions for _ in samples])
    owners = np.array([q for q, samples in enumerate(questions) for _ in samples])
    preferences, differences = np.array([pair for s in questions for pair in s], np.float64).T
    lengths = tanh_normalize(differences)
    value = float(equal_length_win_rates(preferences, lengths, weights[None])[0])
    low = high = None
    if len(questions) > 1:
        generator = np.random.default_rng(seed)
        rates = []
        chunk = max(1, CHUNK_NUMBERS // len(weights))
        for start in range(0, NUM_FITTED_RESAMPLES, chunk):
            size = (min(chunk, NUM_FITTED_RESAMPLES - start), len(questions))
            # How often each question is drawn, with replacement.
            draws = generator.multinomial(size[1], np.full(size[1], 1 / size[1]), size=size[0])
            resampled = draws[:, owners] * weights
            rates.append(equal_length_win_rates(preferences, lengths, resampled))
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = map(float, np.percentile(np.concatenate(rates), [tail, 100 - tail]))
    return {"win_rate": estimate(raw, seed), "lc_win_rate": Estimate(value, low, high)}


def length_difference(response: str, opened: bool, reference: str, part: Part) -> int:
    """Return by how many characters the part of a response that the judge reads is longer than the
    reference.

    Args:
        response: the text as it was sampled.
        opened: the prompt ended with `<think>`.
        reference: the answer that it is compared with.
        part: what the judge reads.
    """
    return len(response_part(response, part, opened).text or "") - len(reference)


def tanh_normalize(differences: np.ndarray) -> np.ndarray:
    """Return tanh(difference / standard deviation), [samples], between -1 and 1; zeros where all
    are equal: nothing can be said of the effect of length then."""
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return np.tanh(differences / spread) if spread else np.zeros_like(differences)


def equal_length_win_rates(
    preferences: np.ndarray, lengths: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return sigmoid(theta), [fits], of logistic regressions that differ in their weights.

    Newton's method on the weighted log-likelihood less PRIOR_PRECISION (theta^2 + phi^2) / 2, which
    has one maximum.

    Args:
        preferences: [samples], from 0 to 1.
        lengths: [samples], as `tanh_normalize` returns them.
        weights: [fits, samples]."""
    inputs = np.stack([np.ones_like(lengths), lengths])  # [2, samples]
    squares = inputs[:, None] * inputs[None]  # [2, 2, samples]
    parameters = np.zeros((len(weights), 2))
    for _ in range(MAX_ITERATIONS):
        predicted = sigmoid(parameters @ inputs)
        gradient = (weights * (preferences - predicted)) @ inputs.T - PRIOR_PRECISION * parameters
        curvature = weights * predicted * (1 - predicted)
        hessian = np.einsum("fs,ijs->fij", curvature, squares) + PRIOR_PRECISION * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        parameters += step / np.maximum(1.0, largest / LARGEST_STEP)
        if largest.max() < 1e-9:
            break
    return sigmoid(parameters[:, 0])


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)), without overflow."""
    return 0.5 * (1.0 + np.tanh(logits / 2))


NUM_BINS = 10


def pair_measures(
    questions: Sequence[str], chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, float]:
    """Return measures of preference pairs by their scores (logits).

    Args:
        questions: the question of each pair.
        chosen: the score of each pair's chosen response.
        rejected: the score of the other.

    Returns:
        accuracy: the share of pairs whose chosen response scores higher, by question, with its
        interval.
        margin: chosen minus rejected.
        loss: -log sigmoid(margin).
        calibration_error: that of sigmoid(|margin|) as the probability that the response with the
        higher score is the chosen one."""
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    certain = sigmoid(np.abs(margins)).tolist()
    right = [float(margin > 0) for margin in margins]
    return _reliability(questions, margins, certain, right)


def label_measures(
    questions: Sequence[str], scores: Sequence[float], labels: Sequence[float]
) -> dict[str, float]:
    """Return measures of labelled responses by their scores (logits).

    Args:
        questions: the question of each response.
        scores: the score of each.
        labels: 1 for a good response, else 0.

    Returns:
        accuracy: the share of scores on their label's side of 0.
        margin: the distance from 0 to that side.
        loss: binary cross entropy.
        calibration_error: that of sigmoid(score) as the probability of a good response."""
    margins = [score if label else -score for score, label in zip(scores, labels, strict=True)]
    return _reliability(questions, margins, sigmoid(np.asarray(scores)).tolist(), labels)


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return Σ_b n_b / n · |mean outcome - mean probability| over ten equal bins of the probability
    (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        probabilities: [n].
        outcomes: [n], 0 or 1."""
    members_of: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for probability, outcome in zip(probabilities, outcomes, strict=True):
        members_of[min(NUM_BINS - 1, int(probability * NUM_BINS))].append((probability, outcome))
    gaps = (abs(sum(outcome - p for p, outcome in members)) for members in members_of.values())
    return sum(gaps) / len(probabilities)


def _reliability(
    questions: Sequence[str],
    margins: Sequence[float],
    probabilities: Sequence[float],
    outcomes: Sequence[float],
) -> dict[str, float]:
    by_question: dict[str, list[float]] = defaultdict(list)
    for question, margin in zip(questions, margins, strict=True):
        by_question[question].append(float(margin > 0))
    accuracy = estimate([fmean(right) for right in by_question.values()])
    measures = {
        "eval/accuracy": accuracy.value,
        "eval/margin": fmean(margins),
        "eval/loss": fmean(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins),
        "eval/calibration_error": expected_calibration_error(probabilities, outcomes),
    }
    if accuracy.low is not None and accuracy.high is not None:
        measures["interval/accuracy/low"] = accuracy.low
        measures["interval/accuracy/high"] = accuracy.high
    return measures
