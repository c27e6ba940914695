"""The 95% interval of a change between two means, by Newcombe's method 10, and the verdict by it.

Source: R. G. Newcombe, "Interval estimation for the difference between independent proportions:
comparison of eleven methods", Statistics in Medicine 17, 1998, 873-890."""

import math

from megatron_r1.reporting.evaluations import HeldoutEstimate

TAIL_PROBABILITY = 0.025
"""The probability beyond each end of an interval of 95%."""
LEARNED, NOT_SHOWN, WORSE = "Learned", "Not shown", "Worse"


def change_verdict(
    first: HeldoutEstimate, last: HeldoutEstimate, num_questions: int | None
) -> tuple[str, str]:
    """Return the verdict of a change, and the sentence that gives its interval.

    The change is `last - first`, and its 95% interval that of a difference of two means that are
    taken as independent (Newcombe 1998, method 10, with the intervals that were recorded):
    from  d - √((last - low_last)² + (high_first - first)²)
    to    d + √((high_last - last)² + (first - low_first)²).
    "Learned" if all of it is above 0, "Worse" if all is below, else "Not shown". Both evaluations
    have the same questions, so that the interval is rather too wide.

    Args:
        first: the mean before.
        last: the mean after.
        num_questions: by it an interval without width, of all right or all wrong, gets that of
            Clopper and Pearson."""
    pair = [_interval_ends(mean, num_questions) for mean in (first, last)]
    if any(low is None or high is None for low, high in pair):
        return NOT_SHOWN, "One question has no interval."
    (low1, high1), (low2, high2) = pair
    assert low1 is not None and high1 is not None and low2 is not None and high2 is not None
    change = last.value - first.value
    low = change - math.hypot(last.value - low2, high1 - first.value)
    high = change + math.hypot(high2 - last.value, first.value - low1)
    verdict = LEARNED if low > 0 else WORSE if high < 0 else NOT_SHOWN
    ends = f"{100 * low:+.0f} to {100 * high:+.0f}"
    return verdict, f"The change is {100 * change:+.1f} points, 95% interval {ends}."


def _interval_ends(
    mean: HeldoutEstimate, num_questions: int | None
) -> tuple[float | None, float | None]:
    if mean.low is None or mean.high is None or mean.low < mean.high or not num_questions:
        return mean.low, mean.high
    width = 1 - TAIL_PROBABILITY ** (1 / num_questions)
    return max(0.0, mean.low - width), min(1.0, mean.high + width)
