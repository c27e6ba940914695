"""Count the words of text in any script, so that a Chinese and an English word weigh the same."""

import re
from dataclasses import dataclass

HAN = "々〆〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
# A clause in these two scripts, or a word of any other letters ("don't" is one).
RUNS = re.compile(f"([{HAN}{KANA}]+)|([^\\W\\d_{HAN}{KANA}]+(?:['’][^\\W\\d_{HAN}{KANA}]+)*)")
HAS_KANA = re.compile(f"[{KANA}]")
LATIN = re.compile("[A-Za-zªºÀ-ÖØ-öø-\u024f\u1e00-\u1eff\ufb00-\ufb06'’]+")
GREEK_SYMBOL = re.compile("[A-Za-z]?[µ\u0370-\u03ff]{1,2}[A-Za-z]?")

# Characters per Chinese word. Hand-segmented corpora have 1.5 (AS) to 1.7 (MSR), punctuation
# counted as words (Emerson 2005, Second International Chinese Word Segmentation Bakeoff); jieba
# finds 1.75 to 1.85 without punctuation. A constant, because the reward hardly depends on it, and
# because no segmenter is both maintained and light.
HAN_PER_WORD = 1.7
# No English word is longer; a longer one is several words joined, five letters each.
MAX_WORD_LETTERS = 20
GLUED_WORD_LETTERS = 5


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
    another script.
    """
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
