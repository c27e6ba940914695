"""Answers that go round in circles."""

from megatron_r1.curation.candidate import Candidate
from megatron_r1.data.prompts import Prompt


def repetition(
    candidate: Candidate, prompt: Prompt, *, min_new: float = 0.7, window: int = 50
) -> str:
    """Less than `min_new` of its windows of `window` characters are new (`rewards.repetition`; half
    of a text that is written twice). Raises ValueError for values that are no share and no
    length."""
    from megatron_r1.rewards.repetition import grade  # numpy, which reading a recipe needs not

    if isinstance(min_new, bool) or not isinstance(min_new, int | float) or not 0 < min_new <= 1:
        raise ValueError(f"min_new must be above 0 and at most 1, got {min_new!r}")
    verdict = grade(candidate.text, window=window)
    return verdict.reason if verdict.reward < min_new else ""
