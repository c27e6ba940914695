"""Find numbers next to a final answer that would be further answers to the question."""

import re

NUMBER = r"[-+]?\d++(?:[.,/]\d++)*+\\?%?"
GLUE = r"[\s$*]"
# Only the number, and at most a word that draws a conclusion from it: `12, so \boxed{13}`.
BARE_BEFORE = re.compile(
    rf"{GLUE}{{0,9}}(?P<number>{NUMBER}){GLUE}{{0,9}}[,;.]?{GLUE}{{0,9}}"
    rf"(?:(?:and|so|then|thus|hence|therefore|no|but){GLUE}{{0,9}}[,:]?)?{GLUE}{{0,9}}",
    re.IGNORECASE,
)
# `1. \boxed{13}`: an item of a list.
LIST_ITEM = re.compile(r"\s*\d{1,2}\.\s*")
BARE_AFTER = re.compile(
    rf"{GLUE}{{0,9}}[,;.]?{GLUE}{{0,9}}(?P<number>{NUMBER}){GLUE}{{0,9}}[.,;]?{GLUE}{{0,9}}"
)
MAX_BARE_CHARS = 120
STATEMENT = re.compile(
    r"(?:(?<!\w)answer\b[\s:*]{0,9}(?:is\b|=)?|答案(?:是|为|等于|[:：]))[\s:*=$]{0,9}"
    # The number ends here, and is not part of a term, a list or a time.
    rf"(?P<number>{NUMBER})(?![\d.,/]*\d|[A-Za-z^_({{\\:])"
    r"(?![\s$]*[-+*/^=\\:]|\s+\d|[\s$]*(?:or|and|times|plus|minus|more|less|divided|of|to)\b|,\s*\d)",
    re.IGNORECASE,
)


def adjacent_numbers(before: str, after: str = "") -> list[str]:
    r"""Return the numbers that alone make up the text before or after a box: `12 \boxed{13}`.

    A number within a sentence or a calculation explains the answer and is not returned.
    """
    numbers = []
    for pattern, text in ((BARE_BEFORE, before), (BARE_AFTER, after)):
        if len(text) > MAX_BARE_CHARS or (pattern is BARE_BEFORE and LIST_ITEM.fullmatch(text)):
            continue
        if (match := pattern.fullmatch(text)) is not None:
            numbers.append(match["number"])
    return numbers


def stated_numbers(text: str) -> list[str]:
    """Return the numbers called the answer: two in "The answer is 12. … answer: 13"."""
    return [match["number"] for match in STATEMENT.finditer(text)]
