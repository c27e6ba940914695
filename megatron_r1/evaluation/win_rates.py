"""Win rates against another model's responses: as judged, and at equal length.

Judges prefer longer responses. AlpacaEval 2 (Dubois et al., arXiv 2404.04475, section 3) therefore
fits the preferences y in [0, 1] by logistic regression on the difference of lengths in characters,

    P(preferred) = sigmoid(theta + phi tanh((length - length of the reference) / s)),

s the standard deviation of the differences, and reports what it predicts at equal length:
sigmoid(theta). Two parts of AlpacaEval's own fit are missing: each instruction's difficulty, which
is fitted to a leaderboard of models, and the L1 penalty chosen by cross-validation, in whose place
theta and phi have a Gaussian prior of standard deviation 5. It matters only where the preferences
alone leave them unbounded."""

from collections.abc import Sequence

import numpy as np
from r1_grading.reading import Part, response_part

from megatron_r1.evaluation.estimates import CONFIDENCE, Estimate, estimate_mean

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
    return {"win_rate": estimate_mean(raw, seed), "lc_win_rate": Estimate(value, low, high)}


def length_difference(response: str, thought_opened: bool, reference: str, part: Part) -> int:
    """Return by how many characters the part of a response that the judge reads is longer than the
    reference.

    Args:
        response: the text as it was sampled.
        thought_opened: the prompt ended with `<think>`.
        reference: the answer that it is compared with.
        part: what the judge reads.
    """
    return len(response_part(response, part, thought_opened).text or "") - len(reference)


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
