"""The outer structure of an answer: brackets, lists, matrices and signs ±.

Comparing member by member, instead of as sympy sets, distinguishes an ordered pair from a set,
counts every candidate that an answer lists, and makes a large matrix cheap."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LATEX_TOKEN = re.compile(
    r"\\\\|\\[{}]|\\[A-Za-z]+|[()\[\]{}]|[,;&=<>|]|\b(?:or|and)\b|[^\\,;&=<>|()\[\]{}oa]+|.",
    re.DOTALL,
)
OPENING = frozenset(("(", "[", "{", r"\{", r"\langle"))
CLOSING = frozenset((")", "]", "}", r"\}", r"\rangle"))
SEPARATORS = frozenset((",", ";", "or", "and"))
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
WITH_THOUSANDS = re.compile(r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
# `(1,200)` is a point or an interval; `(1,000)` may be a number in brackets.
PAIR = re.compile(r"(?:[(\[]|\\\{)\s*[-+]?\d{1,3}(?:,(?!000)\d{3})+\s*(?:[)\]]|\\\})")
# No list has the member 000 or 050, so `1,000` is a number; `1,200` may be either.
ROUND_THOUSANDS = re.compile(r"(?<![\d,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?!\d)")
MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
PLUS_MINUS, MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
SETS = frozenset((r"\{\}", "{}"))


@dataclass(frozen=True)
class Structure:
    """The outer structure of an answer.

    Attributes:
        brackets: "" for a bare list, else a pair such as "[)" or "()".
        members: the texts between them."""

    brackets: str
    members: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        """Whether the brackets are those of a set, where the order does not count."""
        return self.brackets in SETS


def without_thousands(text: str) -> str:
    """Return `text` without the commas between thousands, unless they may separate a pair."""
    if PAIR.search(text):
        return text
    return WITH_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def nesting_depth(text: str) -> int | None:
    """Return how deep brackets are nested in `text`; None where they do not close."""
    depths = [0, *_bracket_depths(LATEX_TOKEN.findall(text))]
    return max(depths) if depths[-1] == 0 and min(depths) == 0 else None


def split_top_level(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Split `text` at separators outside all brackets into (part, separator after it)."""
    parts: list[tuple[str, str]] = []
    part_tokens: list[str] = []
    tokens = LATEX_TOKEN.findall(text)
    for token, depth in zip(tokens, _bracket_depths(tokens), strict=True):
        if depth == 0 and token in separators:
            parts.append(("".join(part_tokens).strip(), token))
            part_tokens = []
        else:
            part_tokens.append(token)
    return [*parts, ("".join(part_tokens).strip(), "")]


def read_structure(text: str) -> Structure | None:
    """Read `text` as a list, set, tuple or interval; None for a single value.

    `1, 2` and `1 or 2` are bare lists; "1,2 and 3" and "1, 2, and 3" have three members."""
    brackets, content = _split_brackets(text)
    # Where a space follows the commas of a list, commas without one may separate thousands.
    if re.search(r",\s", content) or ROUND_THOUSANDS.search(content):
        content = THOUSANDS.sub("", content)
    parts = [part for part, _ in split_top_level(content, SEPARATORS)]
    members = tuple(part for part in parts if part)
    if not brackets or brackets in SETS:
        if not PLUS_MINUS.search(content):  # alone, \mp is \pm in another order
            members = tuple(MINUS_PLUS.sub(r"\\pm", part) for part in members)
        members = tuple(sign for part in members for sign in _both_signs(part))
    if brackets in SETS or len(members) > 1:
        return Structure(brackets, members)
    return None


def read_matrix(text: str) -> list[list[str]] | None:
    """Return the cells of a `matrix`, `pmatrix`, `bmatrix` or `[[1, 2], [3, 4]]`.

    None for any other text."""
    brackets, content = _split_brackets(text)
    if brackets == "[]" and r"\begin" not in content:
        lists = [read_structure(part) for part, _ in split_top_level(content, SEPARATORS)]
        if all(row is not None and row.brackets == "[]" for row in lists):
            return [list(row.members) for row in lists if row is not None]
    match = MATRIX.fullmatch(content if brackets in ("()", "[]") else text.strip())
    if match is None or r"\begin" in match[2]:
        return None
    rows = match[2].strip().removesuffix(r"\\").split(r"\\")
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def match_all(left: Sequence[Any], right: Sequence[Any], is_equal: Callable[..., bool]) -> bool:
    """Whether each item of `left` is the same as another one of `right`, in any order.

    Args:
        left: the items of one side.
        right: those of the other.
        is_equal: compares two items."""
    candidates = list(right)
    for item in left:
        match = next((candidate for candidate in candidates if is_equal(item, candidate)), None)
        if match is None:
            return False
        candidates.remove(match)
    return not candidates


def _both_signs(member: str) -> tuple[str, ...]:
    r"""Return both values of `3 \pm \sqrt{2}`, or the member itself without a `\pm`."""
    if not PLUS_MINUS.search(member):
        return (member,)
    plus = MINUS_PLUS.sub("-", PLUS_MINUS.sub("+", member))
    minus = MINUS_PLUS.sub("+", PLUS_MINUS.sub("-", member))
    return plus, minus


def _split_brackets(text: str) -> tuple[str, str]:
    """Return the brackets around all of `text` ("" if there are none) and the text inside."""
    tokens = LATEX_TOKEN.findall(text.strip())
    if len(tokens) < 2 or tokens[0] not in OPENING or tokens[-1] not in CLOSING:
        return "", text.strip()
    if 0 in _bracket_depths(tokens)[:-1]:
        return "", text.strip()
    return tokens[0] + tokens[-1], "".join(tokens[1:-1]).strip()


def _bracket_depths(tokens: list[str]) -> list[int]:
    """Return in how many brackets each token stands; a closing one counts as outside its own."""
    return list(itertools.accumulate((t in OPENING) - (t in CLOSING) for t in tokens))
