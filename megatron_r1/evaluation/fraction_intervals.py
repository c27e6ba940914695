"""The fraction of a population that has a property, with its interval, by a random sample.

n of N members are drawn without replacement and x of them have the property. The interval has every
count M for which neither tail of the hypergeometric distribution is below 2.5%:

    P(X >= x | N, M, n) > 0.025  and  P(X <= x | N, M, n) > 0.025

(Buonaccorsi 1987, The American Statistician 41, 215; Clopper and Pearson's for N → ∞). It covers
with at least 95% for every M; where all are drawn it is the count itself. **Several strata**, of
which each is sampled by itself: for Σ w p, with an interval (l, u) of each p, from
Σ w p - √Σ w² (p - l)² to Σ w p + √Σ w² (u - p)² (Zou, Huang and Zhang 2009, Computational
Statistics & Data Analysis 53, 1080)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.evaluation.estimates import CONFIDENCE

TAIL_PROBABILITY = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class FractionEstimate:
    """A fraction of a population with its 95% interval.

    Attributes:
        population: how many there are.
        num_sampled: how many of them were drawn at random.
        num_found: drawn ones that have the property.
        num_undecided: drawn ones that may have it or not.
        value: the fraction among the decided; None where none is.
        low: the lower end of the interval.
        high: its upper end."""

    population: int
    num_sampled: int
    num_found: int
    num_undecided: int
    value: float | None
    low: float
    high: float


def sampled_fraction(
    population: int, sampled: int, num_found: int, undecided: int = 0
) -> FractionEstimate:
    """Return the fraction of a population by one random sample of it, drawn without replacement.

    Args:
        population: N, at least 1.
        sampled: n of them, at least 1.
        num_found: how many of these have the property.
        undecided: how many of these may have it or not.

    Raises:
        ValueError: counts that do not fit each other."""
    fits = 1 <= sampled <= population and min(num_found, undecided) >= 0
    if not fits or num_found + undecided > sampled:
        raise ValueError(
            f"{num_found} found and {undecided} undecided of {sampled} drawn of {population}: each "
            "has to be a part of the next"
        )
    decided = sampled - undecided
    return FractionEstimate(
        population,
        sampled,
        num_found,
        undecided,
        num_found / decided if decided else None,
        _min_with_property(population, sampled, num_found) / population,
        _max_with_property(population, sampled, num_found + undecided) / population,
    )


def combined_fraction(fractions: Sequence[FractionEstimate]) -> FractionEstimate:
    """Return the fraction of all strata together, each sampled by itself.

    Args:
        fractions: those of the strata, at least one.

    Raises:
        ValueError: no stratum."""
    if not fractions:
        raise ValueError("a fraction of no stratum at all")
    if len(fractions) == 1:
        return fractions[0]
    population = sum(fraction.population for fraction in fractions)
    weights = [fraction.population / population for fraction in fractions]
    pairs = list(zip(weights, fractions, strict=True))
    # Each end from the fractions that it counts: the undecided are without, or with, the property.
    lower_bounds = [fraction.num_found / fraction.num_sampled for fraction in fractions]
    upper_bounds = [
        (fraction.num_found + fraction.num_undecided) / fraction.num_sampled
        for fraction in fractions
    ]
    lower_margin = math.hypot(
        *(w * (p - stratum.low) for (w, stratum), p in zip(pairs, lower_bounds, strict=True))
    )
    upper_margin = math.hypot(
        *(w * (stratum.high - p) for (w, stratum), p in zip(pairs, upper_bounds, strict=True))
    )
    low = sum(w * p for w, p in zip(weights, lower_bounds, strict=True)) - lower_margin
    high = sum(w * p for w, p in zip(weights, upper_bounds, strict=True)) + upper_margin
    values = [fraction.value for fraction in fractions]
    value = None
    if None not in values:
        value = sum(w * p for w, p in zip(weights, values, strict=True) if p is not None)
    return FractionEstimate(
        population,
        sum(fraction.num_sampled for fraction in fractions),
        sum(fraction.num_found for fraction in fractions),
        sum(fraction.num_undecided for fraction in fractions),
        value,
        max(0.0, low),
        min(1.0, high),
    )


@functools.lru_cache(maxsize=4_096)
def _min_with_property(population: int, sampled: int, num_found: int) -> int:
    """Return the smallest count M in the interval: P(X >= num_found) grows with M."""
    low, high = num_found, population - (sampled - num_found)
    while low < high:
        middle = (low + high) // 2
        if (
            1 - _cumulative_probability(num_found - 1, population, middle, sampled)
            > TAIL_PROBABILITY
        ):
            high = middle
        else:
            low = middle + 1
    return low


def _max_with_property(population: int, sampled: int, num_found: int) -> int:
    """Return the largest count M in the interval: P(X <= num_found) falls with M."""
    return population - _min_with_property(population, sampled, sampled - num_found)


def _cumulative_probability(count: int, population: int, num_marked: int, sampled: int) -> float:
    """Return P(X <= count) of the hypergeometric distribution."""
    first = max(0, sampled - (population - num_marked))
    log_samples = _log_choose(population, sampled)
    return math.fsum(
        math.exp(
            _log_choose(num_marked, drawn)
            + _log_choose(population - num_marked, sampled - drawn)
            - log_samples
        )
        for drawn in range(first, min(count, num_marked, sampled) + 1)
    )


def _log_choose(total: int, part: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(part + 1) - math.lgamma(total - part + 1)
