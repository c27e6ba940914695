r"""Count symbols and single letters as words.

A few of them are mathematics, punctuation or emoji. But a language can be spelled in any of them
(Morse, Braille, `f,i,r,s,t`), so none may be free without bound.
"""

import re

from megatron_r1.rewards.language.words import GLUED_WORD_LETTERS, GREEK_SYMBOL, RUNS

SYMBOL = r"(?:[^\w\s]|_)"
# Symbols of any kind with only white space between them.
STRETCH = re.compile(rf"{SYMBOL}(?:\s*+{SYMBOL})*+")
FREE_PER_STRETCH = 4
"""Between two operands or words: `)) = (` has four symbols."""
# Punctuation and mathematics: ASCII, Latin-1, general and CJK punctuation, arrows, operators.
RARE_RUN = re.compile(
    r"[^\w\s!-~\u00a1-\u00bf×÷\u2010-\u205e\u2190-\u22ff\u27c0-\u27ff\u2900-\u2aff\u3000-\u303f]+"
)


def count_marks(text: str) -> float:
    """Return how many words the symbols and single letters of `text` may encode, five per word.

    A stretch of symbols is free up to four; a run of symbols outside punctuation and mathematics is
    at least one word. Linear in the length of `text`.
    """
    return count_symbols(text) + _count_letters(text)


def count_symbols(text: str) -> float:
    """Return `count_marks` without letters, for a formula, where they are variables."""
    total = 0.0
    for stretch in STRETCH.finditer(text):
        rare = RARE_RUN.findall(stretch[0])
        total += sum(max(1.0, len(run) / GLUED_WORD_LETTERS) for run in rare)
        num_common = len(stretch[0]) - len("".join(rare)) - sum(map(str.isspace, stretch[0]))
        total += max(0, num_common - FREE_PER_STRETCH) / GLUED_WORD_LETTERS
    return total


def _count_letters(text: str) -> float:
    words = (word for _, word in RUNS.findall(text) if word)
    return (
        sum(len(word) for word in words if len(word) == 1 or GREEK_SYMBOL.fullmatch(word))
        / GLUED_WORD_LETTERS
    )
