r"""The outer structure of an answer: brackets, lists and matrices, split without a parser.

Comparing member by member, instead of as sympy sets, distinguishes an ordered pair from a set,
counts every candidate that an answer lists, and makes a large matrix cheap."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN = re.compile(
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
    """The outer structure of an answer. brackets: "" for a bare list, else a pair such as "[)" or
    "()". members: the texts between them."""

    brackets: str
    members: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        return self.brackets in SETS


def without_thousands(text: str) -> str:
    """Return `text` without the commas between thousands, unless they may separate a pair."""
    if PAIR.search(text):
        return text
    return WITH_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def nesting(text: str) -> int | None:
    """Return how deep brackets are nested in `text`; None where they do not close."""
    depths = [0, *_depths(TOKEN.findall(text))]
    return max(depths) if depths[-1] == 0 and min(depths) == 0 else None


def split(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Split `text` at separators outside all brackets into (part, separator after it)."""
    parts: list[tuple[str, str]] = []
    current: list[str] = []
    tokens = TOKEN.findall(text)
    for token, depth in zip(tokens, _depths(tokens), strict=True):
        if depth == 0 and token in separators:
            parts.append(("".join(current).strip(), token))
            current = []
        else:
            current.append(token)
    return [*parts, ("".join(current).strip(), "")]


def read_structure(text: str) -> Structure | None:
    """Read `text` as a list, set, tuple or interval; None for a single value.

    `1, 2` and `1 or 2` are bare lists; "1,2 and 3" and "1, 2, and 3" have three members."""
    brackets, inner = _enclosing(text)
    # Where a space follows the commas of a list, commas without one may separate thousands.
    if re.search(r",\s", inner) or ROUND_THOUSANDS.search(inner):
        inner = THOUSANDS.sub("", inner)
    parts = [part for part, _ in split(inner, SEPARATORS)]
    members = tuple(part for part in parts if part)
    if not brackets or brackets in SETS:
        if not PLUS_MINUS.search(inner):  # alone, \mp is \pm in another order
            members = tuple(MINUS_PLUS.sub(r"\\pm", part) for part in members)
        members = tuple(sign for part in members for sign in _both_signs(part))
    if brackets in SETS or len(members) > 1:
        return Structure(brackets, members)
    return None


def read_matrix(text: str) -> list[list[str]] | None:
    """Return the cells of a `matrix`, `pmatrix`, `bmatrix` or `[[1, 2], [3, 4]]`; None for any
    other text."""
    brackets, inner = _enclosing(text)
    if brackets == "[]" and r"\begin" not in inner:
        lists = [read_structure(part) for part, _ in split(inner, SEPARATORS)]
        if all(row is not None and row.brackets == "[]" for row in lists):
            return [list(row.members) for row in lists if row is not None]
    match = MATRIX.fullmatch(inner if brackets in ("()", "[]") else text.strip())
    if match is None or r"\begin" in match[2]:
        return None
    rows = match[2].strip().removesuffix(r"\\").split(r"\\")
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def match_all(left: Sequence[Any], right: Sequence[Any], same: Callable[..., bool]) -> bool:
    """Whether each item of `left` is the same as another one of `right`, in any order."""
    remaining = list(right)
    for item in left:
        match = next((other for other in remaining if same(item, other)), None)
        if match is None:
            return False
        remaining.remove(match)
    return not remaining


def _both_signs(member: str) -> tuple[str, ...]:
    r"""Return both values of `3 \pm \sqrt{2}`, or the member itself without a `\pm`."""
    if not PLUS_MINUS.search(member):
        return (member,)
    plus = MINUS_PLUS.sub("-", PLUS_MINUS.sub("+", member))
    minus = MINUS_PLUS.sub("+", PLUS_MINUS.sub("-", member))
    return plus, minus


def _enclosing(text: str) -> tuple[str, str]:
    """Return the brackets around all of `text` ("" if there are none) and the text inside."""
    tokens = TOKEN.findall(text.strip())
    if len(tokens) < 2 or tokens[0] not in OPENING or tokens[-1] not in CLOSING:
        return "", text.strip()
    if 0 in _depths(tokens)[:-1]:
        return "", text.strip()
    return tokens[0] + tokens[-1], "".join(tokens[1:-1]).strip()


def _depths(tokens: list[str]) -> list[int]:
    """Return in how many brackets each token stands; a closing one counts as outside its own."""
    return list(itertools.accumulate((t in OPENING) - (t in CLOSING) for t in tokens))
