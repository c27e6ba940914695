"""Measures of a reward model's scores on held-out rows: accuracy, margin and calibration."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from megatron_r1.evaluation.estimates import estimate_mean
from megatron_r1.evaluation.win_rates import sigmoid

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
    is_correct = [float(margin > 0) for margin in margins]
    return _estimate_reliability(questions, margins, certain, is_correct)


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
    return _estimate_reliability(questions, margins, sigmoid(np.asarray(scores)).tolist(), labels)


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


def _estimate_reliability(
    questions: Sequence[str],
    margins: Sequence[float],
    probabilities: Sequence[float],
    outcomes: Sequence[float],
) -> dict[str, float]:
    by_question: dict[str, list[float]] = defaultdict(list)
    for question, margin in zip(questions, margins, strict=True):
        by_question[question].append(float(margin > 0))
    accuracy = estimate_mean([fmean(is_correct) for is_correct in by_question.values()])
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
