"""Answers in more than one language, which R1-Zero writes and nobody reads."""

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters.part import judged_part
from megatron_r1.data.prompts import Prompt
from megatron_r1.rewards.language import LANGUAGES, judged_words


def mixed_languages(
    candidate: Candidate,
    prompt: Prompt,
    *,
    min_share: float = 0.95,
    target: str | None = None,
    part: str = "response",
) -> str:
    """Below `min_share` of the words in one language; counted as the language reward counts
    (`rewards.language`), so code, formulae, names and numbers are in none.

    target: en or zh, the language asked for; default: the question's own `target`, as the reward
    takes it, or whichever most words are in. part: response, or the thought alone - for questions
    that ask for another language than they are thought about in. Raises ValueError for other
    values.
    """
    text = judged_part(candidate, part)
    if not isinstance(min_share, int | float) or not 0 < min_share <= 1:
        raise ValueError(f"min_share must be above 0 and at most 1, got {min_share!r}")
    if target is not None and target not in LANGUAGES:
        raise ValueError(f"target must be one of {', '.join(LANGUAGES)}, got {target!r}")
    words = judged_words(text or "")
    if not words.total:
        return ""
    shares = {name: getattr(words, name) / words.total for name in LANGUAGES}
    own = prompt.fields.get("target")
    wanted = target or (own if own in [*LANGUAGES] else max(shares, key=lambda name: shares[name]))
    if shares[wanted] >= min_share:
        return ""
    return f"{shares[wanted]:.0%} of its words are {LANGUAGES[wanted]}"
