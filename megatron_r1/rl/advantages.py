"""Group-relative advantages (GRPO).

A_i = (r_i - mean(r)) / (std(r) + epsilon) over the G outputs of one question, the same for every
token of output i (DeepSeekMath, arXiv 2402.03300, section 4.1.2; DeepSeek-R1, arXiv 2501.12948, eq.
3). There is no critic. A group whose rewards are all equal teaches nothing: its advantages are 0.
"""

from __future__ import annotations

from statistics import fmean, pstdev


def group_advantages(
    rewards: list[float | None], *, divide_by: str = "group", epsilon: float = 1e-6
) -> list[float]:
    """Advantages of one group of G outputs.

    rewards: G finite numbers, or None for an output that nobody could grade: mean and standard
    deviation are those of the others, and its own advantage is 0. divide_by: "group" for the
    z-score (population standard deviation, as the mean square of the group itself), "none" to leave
    the scale of the rewards (Dr. GRPO). Raises ValueError for an empty group or a reward that is
    not finite.
    """
    if not rewards:
        raise ValueError("a group needs at least one reward")
    graded = [r for r in rewards if r is not None]
    if not all(abs(r) < float("inf") for r in graded):
        raise ValueError(f"rewards must be finite, got {rewards}")
    if len(set(graded)) < 2:
        return [0.0] * len(rewards)
    if divide_by == "none":
        scale = 1.0
    elif divide_by == "group":
        scale = pstdev(graded) + epsilon
    else:
        raise ValueError(f"divide_by {divide_by!r}: use group or none")
    mean = fmean(graded)
    return [0.0 if r is None else (r - mean) / scale for r in rewards]
