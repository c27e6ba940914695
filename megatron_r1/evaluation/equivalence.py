"""A grader that compares two answers by meaning; it runs in the reward workers, which can be
killed.
"""

from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.math import equivalent


def grade(response: str, truth: str, **entry: object) -> Grade:
    """Return 1 if each of the two answers is accepted when the other is the truth.

    math-verify's comparison is not symmetric: if 1 is expected it accepts `2x + z = 1`, but not the
    other way round. A vote needs a symmetric relation.
    """
    same = equivalent(truth, response) and equivalent(response, truth)
    return Grade(float(same), "the same" if same else "different")
