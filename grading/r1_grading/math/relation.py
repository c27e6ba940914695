r"""Equations, inequalities and memberships: their sides, their solutions, and when two agree.

A response may name its answer (`x = 3`), and so may a truth. It must not restate the question:
`2x = 6` is no answer where `x = 3` is expected, although each follows from the other. Here are also
sets by their condition (`\{x \mid x > 2\}`), excluded values (`x \neq 1, 2`) and congruences
(`x \equiv 5 \pmod{7}`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import regex as re  # not Python's: see rewards.py
import sympy

from r1_grading.math.answer_structure import (
    SEPARATORS,
    match_all,
    read_structure,
    split_top_level,
)
from r1_grading.math.symbolic import read_expression, same_value
from r1_grading.reading.context import DENIAL

EQUALS_SIGN, APPROX, MEMBER = "=", r"\approx", r"\in"
INEQUALITIES = {"<": (-1, True), r"\leq": (-1, False), ">": (1, True), r"\geq": (1, False)}
RELATIONS = frozenset(
    (EQUALS_SIGN, APPROX, MEMBER, r"\neq", r"\ne", r"\equiv", r"\sim", r"\simeq", *INEQUALITIES)
)
SET_WORDS = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset|varnothing|backslash)(?![A-Za-z])")
# Possessive (++): otherwise each command would match in several ways, 2^n for n commands.
LETTER = (
    r"(?:[A-Za-z]|\\(?!frac|sqrt|int|sum|pm|mp|[lr]floor|[lr]ceil|pi(?![a-z])|infty)[A-Za-z]++)"
)
SUBSCRIPT = r"(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*"
CALL_ARGUMENTS = r"(?:\s*(?:\([^()=<>]{1,20}\)|\[[^][=<>]{1,20}\]))?"
ITEM = rf"{LETTER}{SUBSCRIPT}{CALL_ARGUMENTS}"
NAME_WORDS = rf"{ITEM}(?:\s*{ITEM}){{0,3}}"
VARIABLE_NAME = re.compile(
    rf"\|?\s*{NAME_WORDS}\s*\|?(?:\s*[:/]\s*{NAME_WORDS})?"
    rf"|\({ITEM}(?:\s*,\s*{ITEM})+\)"
    rf"|\\frac\s*\{{\s*{NAME_WORDS}\s*\}}\s*\{{\s*{NAME_WORDS}\s*\}}"
    r"|\\text\{[A-Za-z .'-]*\}|\\overline\{\w+\}|\\angle\s*\w+"
)
VECTOR = re.compile(
    r"\\(?:vec|overrightarrow|hat|bar|tilde|widehat)(?![A-Za-z])\s*(?:\{\s*(\w{1,3})\s*\}|([A-Za-z]))"
)
"""A letter, or two points, with an arrow or another sign above."""
SUM_OF_NAMES = re.compile(rf"{ITEM}(?:\s*+(?:(?:[-+:/]|\\cdot(?![A-Za-z]))\s*+)?{ITEM}){{0,12}}")
# `when x = 13` states a condition, and no answer.
CONDITION = re.compile(r"\s*(?:\\text\s*\{\s*)?(?:for|when|where|since|because|while|given)\b")
# |x| = 13 leaves the sign of x open, so |x| is no name; |AB| and |A| are lengths and sizes.
MAGNITUDE = re.compile(r"\|\s*[a-z]\s*(?:_[^|]*)?\|")


@dataclass(frozen=True)
class Chain:
    """A chain `a = b < c`: its sides ("a", "b", "c") and the relations ("=", "<") between them."""

    sides: tuple[str, ...]
    relations: tuple[str, ...]


def read_chain(text: str) -> Chain | None:
    """Read the relations of `text` outside all brackets; None where there are none."""
    parts = split_top_level(text, RELATIONS)
    if len(parts) == 1 or any(not side for side, _ in parts):
        return None
    return Chain(tuple(side for side, _ in parts), tuple(relation for _, relation in parts[:-1]))


def is_name(text: str) -> bool:
    r"""Whether `text` is a name: `x`, `x_1`, `f(x)`, `|AB|`, `(a, b)`, `\vec{v}`."""
    text = VECTOR.sub(lambda match: match[1] or match[2], text)
    return VARIABLE_NAME.fullmatch(text.strip()) is not None and not _opens_clause(text)


def is_asked_quantity(text: str) -> bool:
    """Whether `text` is a name, or names combined as in questions: `m + n`, `a : b`; not `|x|`."""
    if MAGNITUDE.fullmatch(text.strip()) or _opens_clause(text):
        return False
    return is_name(text) or SUM_OF_NAMES.fullmatch(text.strip()) is not None


def _opens_clause(text: str) -> bool:
    """Whether words in `text` are no part of a name: `not x`, `when x`."""
    return DENIAL.search(text) is not None or CONDITION.match(text) is not None


def bare_name(text: str) -> str:
    """Return `text` without spaces and braces, to compare names: `x_{1}` and `x_1`."""
    return re.sub(r"[\s{}]", "", text)


def same_relation(expected: Chain, answer: Chain) -> bool:
    """Whether two equations, or two inequalities, constrain the same symbols in the same way.

    Each constraint is written as d > 0, d >= 0 or d = 0; two agree when one d is a constant times
    the other, positive for inequalities. No equation is solved."""
    if _is_solved(expected) and not _is_solved(answer):
        return False
    left, right = _read_constraints(expected), _read_constraints(answer)
    return left is not None and right is not None and match_all(left, right, _same_constraint)


def solution_set(chain: Chain) -> sympy.Set | None:
    """Return the interval of a solved inequality such as `1 < x <= 2`; None for any other."""
    if not _is_solved(chain):
        return None
    sides = ["x" if is_name(side) and "|" not in side else side for side in chain.sides]
    constraints = _read_constraints(Chain(tuple(sides), chain.relations))
    if constraints is None:
        return None
    solution: sympy.Set = sympy.S.Reals
    for kind, difference in constraints:
        if len(difference.free_symbols) != 1 or kind not in ("<", "<="):
            return None
        (symbol,) = difference.free_symbols
        slope = sympy.diff(difference, symbol)
        if not slope.is_number or slope.is_zero:
            return None  # |x| < 1 is no interval from the absolute value alone
        bound = sympy.simplify(-difference.subs(symbol, 0) / slope)
        open_end = kind == "<"
        part = (
            sympy.Interval(bound, sympy.oo, left_open=open_end)
            if slope.is_positive
            else sympy.Interval(-sympy.oo, bound, right_open=open_end)
        )
        solution = solution.intersect(part)
    return solution


def read_set(text: str) -> sympy.Basic | None:
    r"""Read a set: `[1, 2)`, `1 <= x < 2`, `x < 0 or x > 1`, `x > 1 and x < 2`.

    None for a list of relations, for relations of several names, and where one of them is no
    set."""
    parts = split_top_level(text, SEPARATORS)
    chains = [chain for part, _ in parts if (chain := read_chain(part)) is not None]
    if not chains:
        return read_expression(text)
    joints = {joint for _, joint in parts[:-1]}
    if (
        len(chains) < len(parts)
        or joints not in (set(), {"or"}, {"and"})
        or relation_name(text) is None
    ):
        return None
    sets = [_chain_set(chain) for chain in chains]
    if len(sets) == 1:
        return sets[0]
    if not all(isinstance(chain_set, sympy.Set) for chain_set in sets):
        return None
    return (sympy.Union if joints == {"or"} else sympy.Intersection)(*sets)


def relation_name(text: str) -> str | None:
    """Return the one name that the relations of `text` are about; None for several.

    "" without a relation or a name."""
    chains = [read_chain(part) for part, _ in split_top_level(text, SEPARATORS)]
    sides = (side for chain in chains if chain is not None for side in chain.sides)
    names = {bare_name(side) for side in sides if is_name(side)}
    return None if len(names) > 1 else "".join(names)


def same_operands(left: str, right: str) -> bool:
    r"""Whether both are one union, or one intersection, of the same names.

    The names may be in any order: `A \cup B`."""
    for operator in (r"\cup", r"\cap"):
        left_operands = [
            bare_name(part) for part, _ in split_top_level(left, frozenset((operator,)))
        ]
        right_operands = [
            bare_name(part) for part, _ in split_top_level(right, frozenset((operator,)))
        ]
        if min(len(left_operands), len(right_operands)) > 1 and all(map(is_name, left_operands)):
            return sorted(left_operands) == sorted(right_operands)
    return False


def _chain_set(chain: Chain) -> sympy.Basic | None:
    r"""Return the interval of a solved inequality, and the set on the right of `x \in`."""
    if MEMBER not in chain.relations:
        return solution_set(chain)
    if len(chain.sides) == 2 and is_name(chain.sides[0]):
        return read_expression(chain.sides[1])
    return None


def _is_solved(chain: Chain) -> bool:
    """Whether one side is a name and all others are constants."""
    names = [side for side in chain.sides if is_name(side)]
    values = [side for side in chain.sides if not is_name(side)]
    return len(names) == 1 and not any(_has_symbols(side) for side in values)


def _has_symbols(text: str) -> bool:
    expression = read_expression(text)
    return expression is None or bool(getattr(expression, "free_symbols", True))


def _read_constraints(chain: Chain) -> list[tuple[str, sympy.Expr]] | None:
    """Return (kind, difference of two sides) for each relation; None for an unsupported one."""
    sides: list[Any] = [read_expression(side) for side in chain.sides]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    constraints: list[tuple[str, sympy.Expr]] = []
    for left, right, relation in zip(sides, sides[1:], chain.relations, strict=False):
        if relation in INEQUALITIES:
            direction, is_strict = INEQUALITIES[relation]
            if right in (sympy.oo, -sympy.oo) or left in (sympy.oo, -sympy.oo):
                continue  # x < oo is no constraint
            constraints.append(("<" if is_strict else "<=", direction * (left - right)))
        elif relation in (EQUALS_SIGN, r"\neq", r"\ne"):
            constraints.append(("=" if relation == EQUALS_SIGN else "!=", left - right))
        else:
            return None
    return constraints


def _same_constraint(left: tuple[str, sympy.Expr], right: tuple[str, sympy.Expr]) -> bool:
    (kind, difference), (other_kind, other_difference) = left, right
    if kind != other_kind or difference.free_symbols != other_difference.free_symbols:
        return False
    if not difference.free_symbols:
        return False
    # The ratio at one point has to hold everywhere.
    symbols = sorted(other_difference.free_symbols, key=lambda symbol: symbol.name)
    point = {s: sympy.Rational(7 + 3 * k, 11) for k, s in enumerate(symbols)}
    denominator = other_difference.subs(point)
    if denominator.is_zero or not denominator.is_finite:
        return False
    ratio = sympy.nsimplify(difference.subs(point) / denominator, rational=None)
    if not ratio.is_real or ratio.is_zero or (kind in ("<", "<=") and not ratio.is_positive):
        return False
    return same_value(difference, ratio * other_difference, seed="ratio")


SET_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[a-z])\s*(?P<real>\\in\s*\\mathbb\s*\{R\}\s*)?(?:\\mid|\||:)\s*"
    r"(?:(?P=name)\s*\\in\s*\\mathbb\s*\{R\}\s*,\s*)?(?P<condition>.*)\\\}"
)
SUCH_THAT = re.compile(r"(?<=\\\{)([^{}|:\\]*)(?::|\|)(?=.*\\\}$)")


def set_builder_condition(text: str) -> str:
    r"""Return the condition of a set of numbers, x > 2 of `\{x \mid x > 2\}`; else `text`."""
    match = SET_BUILDER.fullmatch(text)
    return SUCH_THAT.sub(r"\1\\mid", text) if match is None else match["condition"].strip()


def read_exclusion(text: str) -> tuple[str, list[str]] | None:
    r"""Return the name and the values of `x \neq 1, 2` and `x \neq 1, x \neq 2`."""
    chains = [part.partition(r"\neq") for part, _ in split_top_level(text, SEPARATORS) if part]
    names = {bare_name(name) for name, relation, _ in chains if relation}
    if len(names) != 1 or not chains[0][1] or not is_name(chains[0][0]):
        return None
    if any(read_chain(name) is not None for name, relation, _ in chains if not relation):
        return None  # `x \neq 1, x > 0`
    values = [value.strip() if relation else name for name, relation, value in chains]
    structure = read_structure(", ".join(values))  # reads \pm, too
    return names.pop(), list(structure.members) if structure else values


SIDE = r"(?:(?!\\equiv|\\pmod|[=,;]).)*"
CONGRUENCE = re.compile(
    rf"(?:(?P<name>{SIDE})(?:\\equiv(?![A-Za-z])|=))?"
    rf"(?P<residue>(?:(?!\\equiv|\\pmod|=).)+)\\pmod\{{(?P<modulus>[^{{}}]+)\}}"
)


def same_congruence(
    expected: str, answer: str, is_equal: Callable[[str, str], bool]
) -> bool | None:
    """Whether both texts are congruences of one name, with equal residues and moduli.

    Either may leave out the name; None where neither is a congruence.

    Args:
        expected: the truth, spelled.
        answer: the answer, spelled.
        is_equal: compares two values."""
    left, right = CONGRUENCE.fullmatch(expected), CONGRUENCE.fullmatch(answer)
    if left is None or right is None:
        return None if left is right else False
    names = {bare_name(name) for name in (left["name"], right["name"]) if name}
    if len(names) > 1:
        return False
    parts = ((left[part].strip(), right[part].strip()) for part in ("modulus", "residue"))
    return all(is_equal(*pair) for pair in parts)
