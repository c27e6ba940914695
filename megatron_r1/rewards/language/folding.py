"""Replace circled, full-width, regional, tag and escaped letters by plain ones."""

import html
import re
import unicodedata

INVISIBLE = re.compile(
    "[\u00ad\u034f\u0300-\u036f\u061c\u180e\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\ufeff\U000e0000-\U000e01ef]+"
)
"""Zero-width, soft-hyphen and direction marks, combining accents, variation selectors: a word with
such characters in it is still that word."""
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30}(?=;));?")
"""An HTML entity of bounded length: html.unescape alone would read a number of any length."""
ENTITY_PASSES = 2
"""`&amp;#102;` is a twice-escaped `f`."""
LETTER_ROWS = {
    **{0x249C: "a", 0x1F110: "A"},  # in brackets
    **{0x1F150: "A", 0x1F170: "A", 0x1F1E6: "A"},  # negative circled and squared; regional
}
"""The first letters of rows that compatibility decomposition keeps, or puts in brackets."""


class _Folding(dict[int, str]):
    """A table for str.translate: each character's compatibility form, computed at its first use.

    One character at a time, because unicodedata sorts a run of combining marks in quadratic time.
    """

    def __missing__(self, code: int) -> str:
        self[code] = unicodedata.normalize("NFKC", chr(code))
        return self[code]


FOLDING = _Folding(
    {
        **{row + i: chr(ord(a) + i) for row, a in LETTER_ROWS.items() for i in range(26)},
        # Tag characters are ASCII that no font shows.
        **{0xE0000 + code: chr(code) for code in range(0x20, 0x7F)},
    }
)


def fold(text: str) -> tuple[str, int]:
    """Return `text` in plain letters without invisible marks, and the number of those marks."""
    for _ in range(ENTITY_PASSES):
        text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if text.isascii():
        return text, 0
    text = text.translate(FOLDING)
    plain = INVISIBLE.sub("", text)
    return plain, len(text) - len(plain)
