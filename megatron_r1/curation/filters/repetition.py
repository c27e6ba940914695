"""Responses that repeat themselves."""

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse


def repetition(
    response: TextResponse, prompt: Prompt, *, min_new: float = 0.7, window: int = 50
) -> str:
    """Drop a response in which less than `min_new` of the windows of `window` characters are new
    (`rewards.repetition`; a text written twice has half). Raises ValueError for values out of
    range."""
    from megatron_r1.rewards.repetition import grade  # numpy, which reading a recipe does not need

    if isinstance(min_new, bool) or not isinstance(min_new, int | float) or not 0 < min_new <= 1:
        raise ValueError(f"min_new must be above 0 and at most 1, got {min_new!r}")
    verdict = grade(response.text, window=window)
    return verdict.reason if verdict.reward < min_new else ""
