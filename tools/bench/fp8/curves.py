"""Loss curves compared as DeepSeek-V3 compares them: smoothed, and as a relative difference.

Appendix B.1: an exponential moving average with coefficient 0.9 of both curves, and the relative
error of the FP8 one; theirs stays within 0.25% (16B and 230B parameters, a trillion tokens)."""

from __future__ import annotations

from statistics import mean

SMOOTHING = 0.9


def smoothed(losses: list[float]) -> list[float]:
    """The exponential moving average, started at the first loss."""
    out, average = [], losses[0]
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        out.append(average)
    return out


def relative_errors(losses: list[float], baseline: list[float]) -> list[float]:
    """(smoothed loss - smoothed baseline) / smoothed baseline, by step."""
    pairs = zip(smoothed(losses), smoothed(baseline), strict=True)
    return [(ours - theirs) / theirs for ours, theirs in pairs]


def compared(losses: list[float], baseline: list[float]) -> dict[str, float]:
    """Of the second half of training: mean, mean magnitude and largest magnitude, as fractions."""
    errors = relative_errors(losses, baseline)
    late = errors[len(errors) // 2 :]
    return {
        "mean": mean(late),
        "mean_magnitude": mean(map(abs, late)),
        "largest": max(map(abs, late)),
    }
