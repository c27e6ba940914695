"""Responses in more than one language, which R1-Zero writes."""

from megatron_r1.curation.filters.part import judged_part
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.language import LANGUAGES, judged_words


def mixed_languages(
    response: TextResponse,
    prompt: Prompt,
    *,
    min_share: float = 0.95,
    target: str | None = None,
    part: str = "response",
) -> str:
    """Drop a response with less than `min_share` of its words in one language.

    Words are counted as by the language reward (`rewards.language`), so code, formulae, names and
    numbers are in no language. target: "en" or "zh"; default: the question's own `target`, as for
    the reward, or the language of most words. part: "response", or "thought" for questions whose
    answer is in another language than the thought. Raises ValueError for other values.
    """
    text = judged_part(response, part)
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
