r"""The second reader's own parser of answers.

The grammar is small: numbers, letters, + - * / ^, fractions, roots, powers, elementary functions,
factorials, one equation `x = …`, and lists, tuples and sets of these. Every other text is
`Unsure`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from r1_grading.second_readers.formulas import (
    MPMATH_FUNCTIONS,
    PI,
    E,
    I,
    Node,
    is_open_sum,
    is_whole,
    same_formula_values,
)

MAX_CHARS = 400
MAX_DEPTH = 40
MAX_MEMBERS = 20
GREEK = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "theta",
    "lambda",
    "mu",
    "rho",
    "sigma",
    "tau",
    "phi",
    "omega",
    "psi",
    "xi",
    "eta",
)
ANSWER_SPELLINGS = (
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|limits)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:qquad|quad)(?![A-Za-z])|\\[,;:! ]"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)(\d)(?![\d.])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[·×⋅]"), "*"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?([A-Z])\)?\s*\}"), r"\1"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ""),
)
WRAPPED = re.compile(r"\A(?:\$\$?(.*?)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\])\Z", re.DOTALL)
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
AMBIGUOUS = (
    ("a comma that may separate thousands", re.compile(r"\d,\d{3}(?!\d)")),
    ("a number with an exponent", re.compile(r"\d[eE][-+]?\d")),
)
TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>\\\{|\\\}|[-+*/^_(){}\[\]|!]))"
)
BRACKETS = {"(": ")", "[": "]", r"\{": r"\}"}


class Unsure(Exception):
    """The reader has no rule for a text; its message says what it met."""


@dataclass(frozen=True)
class Answer:
    """A parsed answer.

    Attributes:
        form: "list" (of one value, too), "set", or the brackets of a tuple or interval.
        members: its values.
        name: x of `x = 3`; "" without.
        percent: whether its value has a percent sign."""

    form: str
    members: tuple[Node, ...]
    name: str = ""
    percent: bool = False


def parse_answer(text: str) -> Answer:
    """Parse the text of an answer.

    Raises:
        Unsure: the text has what the grammar does not have.
    """
    if len(text) > MAX_CHARS:
        raise Unsure("a long answer")
    for pattern, replacement in ANSWER_SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,; ")
    while match := WRAPPED.match(text):
        content = next(group for group in match.groups() if group is not None)
        if "$" in content:
            raise Unsure("several formulas")
        text = content.strip().rstrip(".,; ")
    text = re.sub(r"\A\\?\$\s*(?=\d)", "", text)
    percent = re.search(r"\\?%\s*\Z", text)
    text = text[: percent.start()] if percent else text
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    for fault, pattern in AMBIGUOUS:
        if pattern.search(text):
            raise Unsure(fault)
    name, equals, value = text.partition("=")
    if equals:
        name = name.strip()
        if not re.fullmatch(r"[A-Za-z](?:_\{?\w\}?)?(?:\([A-Za-z]\))?", name):
            raise Unsure("an equation")
        text = value.strip()
    form, parts = _split_answer(text)
    members = tuple(_Parser(part).whole() for part in parts)
    if any(is_open_sum(member) for member in members):
        raise Unsure("a sum of numbers, or a date")
    return Answer(form, members, name.replace(" ", "") if equals else "", bool(percent))


def same_answer_texts(expected: Answer, answer: Answer, seed: str) -> bool | None:
    """Whether two answers have the same values; None where that is not sure.

    Args:
        expected: the truth.
        answer: the response's.
        seed: a text that selects the points."""
    if expected.percent != answer.percent or (
        expected.name and answer.name and expected.name != answer.name
    ):
        return None
    if expected.form != answer.form:
        return None
    if len(expected.members) != len(answer.members):
        return None if _has_repeated(expected, seed) or _has_repeated(answer, seed) else False
    if expected.form not in ("list", "set"):
        return _all_true(
            same_formula_values(*pair, seed)
            for pair in zip(expected.members, answer.members, strict=True)
        )
    unmatched_members = list(answer.members)
    for member in expected.members:
        verdicts = [same_formula_values(member, candidate, seed) for candidate in unmatched_members]
        if True in verdicts:
            unmatched_members.pop(verdicts.index(True))
        elif None in verdicts:
            return None
        else:
            return False
    return True


def _has_repeated(answer: Answer, seed: str) -> bool:
    pairs = itertools.combinations(answer.members, 2)
    return any(same_formula_values(*pair, seed) is not False for pair in pairs)


def _all_true(verdicts: Iterable[bool | None]) -> bool | None:
    all_verdicts = list(verdicts)
    return False if False in all_verdicts else None if None in all_verdicts else True


def _split_answer(text: str) -> tuple[str, list[str]]:
    """Return the form of an answer and the texts of its members."""
    form, content = "list", text
    for start, end in BRACKETS.items():
        if text.startswith(start) and text.endswith(end) and _is_one_bracket(text, start, end):
            parts = _split_at_commas(text[len(start) : -len(end)])
            if len(parts) > 1 or start == r"\{":
                form = "set" if start == r"\{" else start + end
                content = text[len(start) : -len(end)]
    parts = _split_at_commas(content) if content.strip() else []
    if not parts or len(parts) > MAX_MEMBERS:
        raise Unsure("no value" if not parts else "many values")
    return form, parts


def _is_one_bracket(text: str, start: str, end: str) -> bool:
    depth = 0
    for match in re.finditer(r"\\[{}]|[()\[\]]", text):
        depth += 1 if match[0] in BRACKETS else -1
        if depth == 0 and match.end() < len(text):
            return False
    return depth == 0


def _split_at_commas(text: str) -> list[str]:
    depth, parts, begin = 0, [], 0
    for match in re.finditer(r"\\[{}]|[()\[\]{},]", text):
        if match[0] == ",":
            if depth == 0:
                parts.append(text[begin : match.start()])
                begin = match.end()
        else:
            depth += 1 if match[0] in ("(", "[", "{", r"\{") else -1
    return [*parts, text[begin:]]


class _Parser:
    """Recursive descent over one formula."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position, text = 0, text.strip()
        while position < len(text):
            match = TOKEN.match(text, position)
            if match is None:
                raise Unsure(f"the sign {text[position:].strip()[:1]!r}")
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind]))
            position = match.end()
        self._position = self._depth = 0

    def whole(self) -> Node:
        if not self._tokens:
            raise Unsure("no value")
        node = self._parse_sum()
        if self._position < len(self._tokens):
            raise Unsure(f"the sign {self._tokens[self._position][1]!r}")
        return node

    def _next_token(self) -> tuple[str, str]:
        return self._tokens[self._position] if self._position < len(self._tokens) else ("", "")

    def _take_token(self, *signs: str) -> str:
        kind, text = self._next_token()
        if kind and (not signs or text in signs):
            self._position += 1
            return text
        return ""

    def _expect_sign(self, sign: str) -> None:
        if not self._take_token(sign):
            raise Unsure(f"{sign!r} is missing")

    def _parse_sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unsure("deep nesting")
        sign = self._take_token("+", "-")
        node = self._parse_product()
        node = Node("negative", (node,)) if sign == "-" else node
        while sign := self._take_token("+", "-"):
            node = Node("plus" if sign == "+" else "minus", (node, self._parse_product()))
        self._depth -= 1
        return node

    def _parse_product(self) -> Node:
        node = self._parse_factor()
        while True:
            if sign := self._take_token("*", "/"):
                is_negative = self._take_token("-")
                factor = self._parse_factor()
                factor = Node("negative", (factor,)) if is_negative else factor
                node = Node("times" if sign == "*" else "divided", (node, factor))
                continue
            kind, text = self._next_token()
            starts = kind in ("word", "command") or text in ("(", "[", "{")
            if kind == "number":
                raise Unsure("a number behind a factor")
            if not starts:
                return node
            if text == "\\frac" and node.name == "number":
                raise Unsure("a mixed number")
            node = Node("times", (node, self._parse_factor()))

    def _parse_factor(self) -> Node:
        node = self._parse_atom()
        while True:
            if self._take_token("^"):
                exponent = self._parse_exponent()
                node = Node("power", (node, exponent))
            elif self._take_token("!"):
                node = Node("factorial", (node,))
            else:
                return node

    def _parse_exponent(self) -> Node:
        if self._next_token()[1] == "{":
            return self._parse_group("{", "}")
        sign = self._take_token("-")
        kind, text = self._next_token()
        if kind == "number" and len(text) > 1 and "\\" not in text:
            # `x^23` is x^2 3 in LaTeX and x^23 elsewhere.
            raise Unsure("an exponent without braces")
        node = self._parse_atom()
        return Node("negative", (node,)) if sign else node

    def _parse_group(self, start: str, end: str) -> Node:
        self._expect_sign(start)
        node = self._parse_sum()
        self._expect_sign(end)
        return node

    def _parse_atom(self) -> Node:
        kind, text = self._next_token()
        if text in ("(", "[", "{"):
            return self._parse_group(text, {"(": ")", "[": "]", "{": "}"}[text])
        if text == "|":
            self._position += 1
            node = self._parse_sum()
            self._expect_sign("|")
            return Node("absolute", (node,))
        if kind == "number":
            self._position += 1
            if self._next_token()[1] == "_":
                raise Unsure("a base")
            return Node("number", value=Fraction(text), is_decimal="." in text)
        if kind == "word":
            self._position += 1
            return self._parse_word(text)
        if kind == "command":
            self._position += 1
            return self._parse_command(text[1:])
        raise Unsure(f"the sign {text!r}" if kind else "a formula that breaks off")

    def _parse_word(self, text: str) -> Node:
        if text in MPMATH_FUNCTIONS or text in ("log", "sqrt", "pi"):
            return self._parse_command(text)
        if len(text) > 1:
            raise Unsure(f"the word {text!r}")
        if text in ("e", "i"):
            return E if text == "e" else I
        return self._parse_letter(text)

    def _parse_letter(self, name: str) -> Node:
        if self._take_token("_"):
            index = self._group_text() if self._next_token()[1] == "{" else self._take_token()
            name = f"{name}_{index}"
        if self._next_token()[1] == "(" and len(name) == 1 and name in "fghFGH":
            raise Unsure("a function without a formula")
        return Node("letter", value=name)

    def _group_text(self) -> str:
        self._expect_sign("{")
        texts = []
        while (text := self._take_token()) not in ("}", ""):
            texts.append(text)
        return "".join(texts)

    def _parse_command(self, name: str) -> Node:
        if name == "pi":
            return PI
        if name in GREEK:
            return self._parse_letter(f"\\{name}")
        if name == "frac":
            return Node("divided", (self._parse_argument(), self._parse_argument()))
        if name == "sqrt":
            index = Node("number", value=Fraction(2))
            if self._next_token()[1] == "[":
                index = self._parse_group("[", "]")
            if not is_whole(index) or not 1 < index.value < 100:
                raise Unsure("the index of a root")
            return Node("root", (index, self._parse_argument()))
        if name == "log":
            if not self._take_token("_"):
                raise Unsure("a logarithm without its base")
            return Node("log", (self._parse_argument(), self._function_argument()))
        if name in MPMATH_FUNCTIONS:
            power = self._parse_exponent() if self._take_token("^") else None
            node = Node(name, (self._function_argument(),))
            return node if power is None else Node("power", (node, power))
        raise Unsure(f"the command \\{name}")

    def _parse_argument(self) -> Node:
        kind, text = self._next_token()
        if kind == "number" and len(text) > 1:
            raise Unsure("an argument without braces")
        return self._parse_atom()

    def _function_argument(self) -> Node:
        """Return what a function is applied to: one bracket, or factors without a sign."""
        if self._next_token()[1] in ("(", "{", "["):
            node = self._parse_atom()
            if self._next_token()[1] == "^":
                raise Unsure("a power behind a function's bracket")
            return node
        node = self._parse_factor()
        while self._next_token()[0] == "word" and len(self._next_token()[1]) == 1:
            node = Node("times", (node, self._parse_factor()))
        return node
