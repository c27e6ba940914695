"""Language consistency: the share of the chain of thought in the target language.

    reward = words in the target language / words        (DeepSeek-R1, arXiv 2501.12948 v2, eq. 5)

Code, formulae, numbers, identifiers and symbols are in no language and do not count, up to a share
of the words: a thought with more of them is written in them. A Chinese word is 1.7 characters
(`words`). The script decides, so a Latin word of another language counts as English."""

from megatron_r1.rewards.answer import END_THINK, THINK
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.language.prose import FENCED_WEIGHT, prose
from megatron_r1.rewards.language.words import WordCount, count_words

LANGUAGES = {"en": "English", "zh": "Chinese"}
FREE_WORDS, FREE_SHARE = 8, 1 / 2
"""Words of inline code, formulae and identifiers that do not count: FREE_WORDS, and FREE_SHARE of
the words of the prose. An explanation of a program may name an identifier in every third word."""


def grade(
    response: str, truth: object = None, *, target: str, opened: bool = False, **entry: object
) -> Grade:
    """Return the share of the thought's words that are in the language `target`, "en" or "zh".

    0 for a response without a thought, and for a thought without words. Linear in the length of the
    response. Raises ValueError for another target."""
    if not isinstance(target, str) or target not in LANGUAGES:
        raise ValueError(f"target must be one of {', '.join(LANGUAGES)}, got {target!r}")
    thought = chain_of_thought(response, opened)
    if thought is None:
        return Grade(0.0, "no chain of thought")
    words = judged_words(thought)
    if not words.total:
        return Grade(0.0, "no words in the chain of thought")
    share = getattr(words, target) / words.total
    counts = f"English {words.en:.0f}, Chinese {words.zh:.0f}, other {words.other:.0f}"
    return Grade(share, f"{share:.1%} of its words are {LANGUAGES[target]} ({counts})")


def judged_words(thought: str) -> WordCount:
    """Count the words of the prose, and the words in code, formulae and symbols that exceed the
    free share. A thought without prose has no words."""
    parts = prose(thought)
    words = count_words(parts.text)
    neutral = count_words(parts.inline).plus(count_words(parts.fenced), FENCED_WEIGHT)
    neutral = neutral.plus(WordCount(0, 0, parts.marks), 1)
    beyond = neutral.total - FREE_WORDS - FREE_SHARE * words.total
    if beyond <= 0 or not words.total:
        return words
    return words.plus(neutral, beyond / neutral.total)


def chain_of_thought(response: str, opened: bool = False) -> str | None:
    """Return the text from the first `<think>` to the last `</think>`; None without a `<think>`.

    opened: the prompt ended with `<think>`, so the response begins inside the thought. A thought
    that is never closed (a response cut at its length limit) extends to the end."""
    if not opened:
        _, found, response = response.partition(THINK)
        if not found:
            return None
    inside, closed, rest = response.rpartition(END_THINK)
    return (inside if closed else rest).replace(THINK, " ").replace(END_THINK, " ")
