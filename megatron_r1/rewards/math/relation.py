r"""Equations, inequalities and memberships: what they say, and of what.

A response may name its answer (`x = 3`), and a truth may too. What it may not do is restate the
question: `2x = 6` is no answer where `x = 3` is expected, though one follows from the other.
"""

import re
from dataclasses import dataclass

import sympy

from megatron_r1.rewards.math.structure import split
from megatron_r1.rewards.math.symbolic import read_expression, same_value

EQUAL, APPROX, MEMBER = "=", r"\approx", r"\in"
INEQUALITIES = {"<": (-1, True), r"\leq": (-1, False), ">": (1, True), r"\geq": (1, False)}
RELATIONS = frozenset(
    (EQUAL, APPROX, MEMBER, r"\neq", r"\ne", r"\equiv", r"\sim", r"\simeq", *INEQUALITIES)
)
SET_WORDS = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset|varnothing|backslash)(?![A-Za-z])")
# Possessive (++): the end of a command is not a letter of its own, which would allow 2^n readings.
LETTER = (
    r"(?:[A-Za-z]|\\(?!frac|sqrt|int|sum|pm|mp|[lr]floor|[lr]ceil|pi(?![a-z])|infty)[A-Za-z]++)"
)
SUBSCRIPT = r"(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*"
ARGUMENTS = r"(?:\s*\([^()=<>]{1,20}\))?"
ITEM = rf"{LETTER}{SUBSCRIPT}{ARGUMENTS}"
WORD = rf"{ITEM}(?:\s*{ITEM}){{0,3}}"
NAME = re.compile(
    rf"\|?\s*{WORD}\s*\|?(?:\s*[:/]\s*{WORD})?"
    rf"|\({ITEM}(?:\s*,\s*{ITEM})+\)"
    rf"|\\frac\s*\{{\s*{WORD}\s*\}}\s*\{{\s*{WORD}\s*\}}"
    r"|\\text\{[A-Za-z .'-]*\}|\\overline\{\w+\}|\\angle\s*\w+"
)
SUM_OF_NAMES = re.compile(rf"{ITEM}(?:\s*+(?:(?:[-+:/]|\\cdot(?![A-Za-z]))\s*+)?{ITEM}){{0,12}}")
# |x| = 13 leaves the sign of x open; |AB| and |A| are lengths and sizes.
MAGNITUDE = re.compile(r"\|\s*[a-z]\s*(?:_[^|]*)?\|")


@dataclass(frozen=True)
class Chain:
    """`a = b < c`: sides ("a", "b", "c") and the relations ("=", "<") between them."""

    sides: tuple[str, ...]
    relations: tuple[str, ...]


def read_chain(text: str) -> Chain | None:
    """The relation that `text` is outside all brackets; None where there is none."""
    parts = split(text, RELATIONS)
    if len(parts) == 1 or any(not side for side, _ in parts):
        return None
    return Chain(tuple(side for side, _ in parts), tuple(relation for _, relation in parts[:-1]))


def is_name(text: str) -> bool:
    r"""Whether `text` only names something: `x`, `x_1`, `f(x)`, `|AB|`, `(a, b)`; no number."""
    return NAME.fullmatch(text.strip()) is not None


def is_asked_quantity(text: str) -> bool:
    """A name, or names put together as questions do: `m + n`, `a : b`; not `|x|`."""
    if MAGNITUDE.fullmatch(text.strip()):
        return False
    return is_name(text) or SUM_OF_NAMES.fullmatch(text.strip()) is not None


def squeeze(text: str) -> str:
    """`text` without spaces and braces, for names: `x_{1}` and `x_1`."""
    return re.sub(r"[\s{}]", "", text)


def same_relation(expected: Chain, answer: Chain) -> bool:
    """Whether two equations, or two inequalities, say the same of the same symbols.

    Each side's constraints are brought to d > 0, d >= 0 or d = 0; two of them agree when one d is a
    constant times the other, positive for inequalities. No equation is solved.
    """
    if _is_solved(expected) and not _is_solved(answer):
        return False
    ours, theirs = _constraints(expected), _constraints(answer)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    left = list(theirs)
    for constraint in ours:
        match = next((other for other in left if _same_constraint(constraint, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def solution_set(chain: Chain) -> sympy.Set | None:
    """The interval that a solved inequality describes: `1 < x <= 2`; None for any other."""
    if not _is_solved(chain):
        return None
    sides = ["x" if is_name(side) and "|" not in side else side for side in chain.sides]
    if (constraints := _constraints(Chain(tuple(sides), chain.relations))) is None:
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
    """The set that a text writes: `[1, 2)`, `1 <= x < 2`, `x < 0 or x > 1`."""
    parts = split(text, frozenset(("or",)))
    chains = [read_chain(part) for part, _ in parts]
    if None not in chains and not any(MEMBER in chain.relations for chain in chains):
        solutions = [solution_set(chain) for chain in chains]
        return None if None in solutions else sympy.Union(*solutions)
    if len(parts) == 1 and chains[0] is not None and is_name(chains[0].sides[0]):
        text = chains[0].sides[-1]
    return read_expression(text)


def _is_solved(chain: Chain) -> bool:
    """One lone name, and constants around it."""
    names = [side for side in chain.sides if is_name(side)]
    others = [side for side in chain.sides if not is_name(side)]
    return len(names) == 1 and not any(_has_symbols(side) for side in others)


def _has_symbols(text: str) -> bool:
    expression = read_expression(text)
    return expression is None or bool(getattr(expression, "free_symbols", True))


def _constraints(chain: Chain) -> list[tuple[str, sympy.Expr]] | None:
    sides = [read_expression(side) for side in chain.sides]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    constraints = []
    for left, right, relation in zip(sides, sides[1:], chain.relations, strict=False):
        if relation in INEQUALITIES:
            direction, strict = INEQUALITIES[relation]
            if right in (sympy.oo, -sympy.oo) or left in (sympy.oo, -sympy.oo):
                continue  # x < oo says nothing
            constraints.append(("<" if strict else "<=", direction * (left - right)))
        elif relation in (EQUAL, r"\neq", r"\ne"):
            constraints.append(("=" if relation == EQUAL else "!=", left - right))
        else:
            return None
    return constraints


def _same_constraint(ours: tuple[str, sympy.Expr], theirs: tuple[str, sympy.Expr]) -> bool:
    (kind, difference), (other_kind, other) = ours, theirs
    if kind != other_kind or difference.free_symbols != other.free_symbols:
        return False
    if not difference.free_symbols:
        return False
    # The ratio is read off at one point and then has to hold everywhere.
    point = {
        s: sympy.Rational(7 + 3 * k, 11)
        for k, s in enumerate(sorted(other.free_symbols, key=lambda s: s.name))
    }
    bottom = other.subs(point)
    if bottom.is_zero or not bottom.is_finite:
        return False
    ratio = sympy.nsimplify(difference.subs(point) / bottom, rational=None)
    if not ratio.is_real or ratio.is_zero or (kind in ("<", "<=") and not ratio.is_positive):
        return False
    return same_value(difference, ratio * other, seed="ratio")
