"""Count the words of text in any script, so that a Chinese and an English word weigh the same,
and symbols and single letters as words."""

from dataclasses import dataclass

import regex as re  # not Python's: see rewards/__init__.py

HAN = "々〆〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
RUNS = re.compile(f"([{HAN}{KANA}]+)|([^\\W\\d_{HAN}{KANA}]+(?:['’][^\\W\\d_{HAN}{KANA}]+)*)")
"""A clause in these two scripts, or a word of any other letters ("don't" is one)."""
HAS_KANA = re.compile(f"[{KANA}]")
LATIN = re.compile("[A-Za-zªºÀ-ÖØ-öø-\u024f\u1e00-\u1eff\ufb00-\ufb06'’]+")
GREEK_SYMBOL = re.compile("[A-Za-z]?[µ\u0370-\u03ff]{1,2}[A-Za-z]?")

HAN_PER_WORD = 1.7
"""Characters per Chinese word. Hand-segmented corpora have 1.5 (AS) to 1.7 (MSR), punctuation
counted as words (Emerson 2005, Second International Chinese Word Segmentation Bakeoff); jieba finds
1.75 to 1.85 without punctuation. A constant, because the reward hardly depends on it, and because
no segmenter is both maintained and light."""
MAX_WORD_LETTERS = 20
"""No English word has more letters; a longer one counts as several words joined, of
GLUED_WORD_LETTERS each."""
GLUED_WORD_LETTERS = 5

# A few symbols and single letters are mathematics, punctuation or emoji. But a language can be
# spelled in any of them (Morse, Braille, `f,i,r,s,t`), so none may be free without bound.
SYMBOL = r"(?:[^\w\s]|_)"
STRETCH = re.compile(rf"{SYMBOL}(?:\s*+{SYMBOL})*+")
"""Symbols of any kind with only white space between them."""
FREE_PER_STRETCH = 4
"""Symbols that may stand between two operands or words: `)) = (` has four."""
RARE_RUN = re.compile(
    r"[^\w\s!-~\u00a1-\u00bf×÷\u2010-\u205e\u2190-\u22ff\u27c0-\u27ff\u2900-\u2aff\u3000-\u303f]+"
)
"""A run of symbols outside punctuation and mathematics, which are ASCII, Latin-1, general and CJK
punctuation, arrows and operators."""


@dataclass(frozen=True)
class WordCount:
    """Words by language; other: neither. Fractions, because Chinese words are estimated."""

    en: float
    zh: float
    other: float

    @property
    def total(self) -> float:
        return self.en + self.zh + self.other

    def plus(self, others: "WordCount", weight: float) -> "WordCount":
        """Return the sum with `others` counted `weight` times."""
        return WordCount(
            self.en + weight * others.en,
            self.zh + weight * others.zh,
            self.other + weight * others.other,
        )


def count_words(text: str) -> WordCount:
    """Count words by script; single letters are variables and do not count.

    English: Latin words, except those in lower case with accents. Chinese: Han characters, except
    in a clause with Japanese kana. Other: all other letters, and Latin words with a letter of
    another script."""
    en = han = other = 0.0
    for clause, word in RUNS.findall(text):
        if clause:
            if HAS_KANA.search(clause):
                other += len(clause) / HAN_PER_WORD
            else:
                han += len(clause)
        elif len(word) > 1:
            weight = 1.0 if len(word) <= MAX_WORD_LETTERS else len(word) / GLUED_WORD_LETTERS
            if word.isascii() or (LATIN.fullmatch(word) and _is_english(word)):
                en += weight
            elif not GREEK_SYMBOL.fullmatch(word):
                other += weight
    return WordCount(en, han / HAN_PER_WORD, other)


def _is_english(word: str) -> bool:
    """Whether a Latin word may be English: only names have accents (Erdős, Poincaré)."""
    return word[0].isupper() or word.replace("’", "").isascii()


def count_marks(text: str) -> float:
    """Return how many words the symbols and single letters of `text` may encode, five per word. A
    run of symbols outside punctuation and mathematics is at least one. Linear in the length."""
    words = (word for _, word in RUNS.findall(text))
    letters = sum(len(w) for w in words if len(w) == 1 or GREEK_SYMBOL.fullmatch(w))
    return count_symbols(text) + letters / GLUED_WORD_LETTERS


def count_symbols(text: str) -> float:
    """Return `count_marks` without letters, for a formula, where they are variables."""
    total = 0.0
    for stretch in STRETCH.finditer(text):
        rare = RARE_RUN.findall(stretch[0])
        total += sum(max(1.0, len(run) / GLUED_WORD_LETTERS) for run in rare)
        num_common = len(stretch[0]) - len("".join(rare)) - sum(map(str.isspace, stretch[0]))
        total += max(0, num_common - FREE_PER_STRETCH) / GLUED_WORD_LETTERS
    return total
