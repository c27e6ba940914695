r"""Whether two answers mean the same: the rules, from the outside of an answer to its inside.

Text and choices; written numbers; named values; lists, sets, tuples, intervals and matrices, member
by member; inequalities; and at last single expressions, by a computer algebra system. Whatever can
be read in two ways is wrong.
"""

import sympy
from math_verify import verify

from megatron_r1.rewards.answer import unwrap
from megatron_r1.rewards.math import text as math_text
from megatron_r1.rewards.math.chinese import split_han_unit
from megatron_r1.rewards.math.finished import is_division, is_unfinished
from megatron_r1.rewards.math.limits import refusal
from megatron_r1.rewards.math.lists import compare_lists, compare_matrices
from megatron_r1.rewards.math.number import read_number, same_number
from megatron_r1.rewards.math.phrases import read_moment, read_phrase
from megatron_r1.rewards.math.relation import (
    APPROX,
    EQUAL,
    MEMBER,
    SET_WORDS,
    Chain,
    is_asked_quantity,
    is_name,
    read_chain,
    read_set,
    same_relation,
    solution_set,
    squeeze,
)
from megatron_r1.rewards.math.spelling import spell
from megatron_r1.rewards.math.structure import SEPARATORS, split
from megatron_r1.rewards.math.symbolic import constant, read_expression, same_expression
from megatron_r1.rewards.math.units import same_unit, split_unit

APPROXIMATION = 0.01


def compare(truth: str, answer: str) -> tuple[bool, str]:
    """Whether `answer` means `truth`, and why it was not even compared ("" where it was).

    Runs sympy: only within time and memory limits.
    """
    (expected, ours), (answer, theirs) = map(split_han_unit, (unwrap(truth), unwrap(answer)))
    if not same_unit(ours, theirs):
        return False, ""
    if (moment := read_moment(expected)) is not None:
        return moment == read_moment(answer), ""
    expected, answer = read_phrase(expected), read_phrase(answer)
    if math_text.is_letter(expected):
        choice = math_text.read_choice(answer)
        letter = math_text.read_choice(expected)[0]
        if choice is not None:
            return choice[0] == letter, ""
        bare = math_text.plain(answer)
        return len(bare) == 1 and bare.islower() and bare.upper() == letter, ""
    words = math_text.is_words(expected, truth)
    same = math_text.same_words(expected, answer, ignore_case=words)
    if same or words or math_text.is_order(expected):
        return same, ""
    if (choice := math_text.read_choice(expected)) is not None and choice[1]:
        return _same_labelled(choice, answer)
    left, right = spell(expected), spell(answer)
    if (numbers := _same_numbers(left, right)) is not None:
        return numbers, "" if numbers or not is_division(left, right) else "a division is left open"
    if (reason := refusal(left, right)) is not None:
        return False, reason
    return equivalent(left, right), ""


def equivalent(expected: str, answer: str, *, finished: bool = True) -> bool:
    """The comparison of two spelled texts that are not refused; recursive over their structure.

    finished: a number has to be worked out; on the way to one (`2 + 11 = 13`) it need not be.
    """
    if (numbers := _same_numbers(expected, answer, finished=finished)) is not None:
        return numbers
    for rule in (_as_named, _as_units, _as_members, _as_sets):
        if (verdict := rule(expected, answer)) is not None:
            return verdict
    if finished and is_unfinished(expected, answer):
        return False
    return same_expression(expected, answer)


def _same_labelled(expected: tuple[str, str], answer: str) -> tuple[bool, str]:
    """A truth such as `(C) 12`: its letter, or its text, or both."""
    choice = math_text.read_choice(answer)
    if choice is None:
        return compare(expected[1], answer)
    if choice[0] != expected[0]:
        return False, ""
    return compare(expected[1], choice[1]) if choice[1] else (True, "")


def _same_numbers(expected: str, answer: str, *, finished: bool = True) -> bool | None:
    left = read_number(expected)
    right = read_number(answer) if left is not None else None
    if right is None:
        return None
    if finished and is_division(expected, answer):
        return False
    return same_number(left, right)


def _as_named(expected: str, answer: str) -> bool | None:
    """Equations, inequalities and memberships on either side; None where there are none."""
    if len(split(expected, SEPARATORS)) > 1 or len(split(answer, SEPARATORS)) > 1:
        return None
    ours, theirs = read_chain(expected), read_chain(answer)
    if theirs is not None and APPROX in theirs.relations:
        return _approximated(expected, theirs)
    if ours is not None and APPROX in ours.relations:
        return equivalent(ours.sides[-1], answer) if is_name(ours.sides[0]) else None
    if ours is None and theirs is None:
        return None
    if theirs is None:
        return _unnamed(ours, answer)
    if ours is None:
        return _named(expected, theirs)
    return _both_related(ours, theirs)


def _unnamed(ours: Chain, answer: str) -> bool:
    """The truth is a relation, the answer is not: 3 for x = 3, (1, 2) for 1 < x < 2."""
    if set(ours.relations) <= {EQUAL, MEMBER}:
        names = [is_name(side) for side in ours.sides]
        if all(names[:-1]):
            return equivalent(ours.sides[-1], answer)
        return len(names) == 2 and names[1] and not names[0] and equivalent(ours.sides[0], answer)
    return _same_set(_truth_set(ours), read_expression(answer))


def _named(expected: str, theirs: Chain) -> bool:
    """The answer is a relation, the truth is not: each side must be a name or the truth itself."""
    if set(theirs.relations) <= {EQUAL, MEMBER}:
        value = theirs.sides[-1]
        if is_asked_quantity(value) and not is_name(theirs.sides[0]) and len(theirs.sides) == 2:
            return equivalent(expected, theirs.sides[0])
        others = [side for side in theirs.sides[:-1] if not is_asked_quantity(side)]
        steps = all(equivalent(expected, side, finished=False) for side in others)
        return steps and equivalent(expected, value)
    solution = solution_set(theirs)
    return solution is not None and _same_set(read_expression(expected), solution)


def _both_related(ours: Chain, theirs: Chain) -> bool:
    if set(ours.relations) | set(theirs.relations) <= {EQUAL, MEMBER}:
        ours, theirs = _name_first(ours), _name_first(theirs)
        if is_name(ours.sides[0]) and is_name(theirs.sides[0]):
            same_name = squeeze(ours.sides[0]) == squeeze(theirs.sides[0])
            if same_name:
                others = [side for side in theirs.sides[1:] if not is_name(side)]
                if not others or not equivalent(ours.sides[-1], others[-1]):
                    return False
                return all(equivalent(ours.sides[-1], s, finished=False) for s in others[:-1])
    if MEMBER in ours.relations or MEMBER in theirs.relations:
        member, other = (ours, theirs) if MEMBER in ours.relations else (theirs, ours)
        if MEMBER in other.relations or squeeze(member.sides[0]) not in squeeze(str(other.sides)):
            return False
        solution = solution_set(other) if other is theirs else _truth_set(other)
        return _same_set(read_expression(member.sides[-1]), solution)
    return same_relation(ours, theirs)


def _approximated(expected: str, theirs: Chain) -> bool:
    """`x = 2/3 \\approx 0.67`: the exact side counts, the others must be near it."""
    cut = theirs.relations.index(APPROX)
    if is_asked_quantity(theirs.sides[cut]) and cut == 0:
        exact, near = theirs.sides[1], theirs.sides[2:]
    else:
        exact, near = theirs.sides[cut], theirs.sides[cut + 1 :]
    if any(relation not in (EQUAL, APPROX) for relation in theirs.relations):
        return False
    before = [side for side in theirs.sides[:cut] if not is_asked_quantity(side)]
    if not all(equivalent(expected, side) for side in (exact, *before)):
        return False
    value = constant(exact)
    numbers = [read_number(side) for side in near]
    if not value or None in numbers:
        return False
    return all(
        abs(n.value.numerator / value / n.value.denominator - 1) <= APPROXIMATION for n in numbers
    )


def _as_units(expected: str, answer: str) -> bool | None:
    (left, unit), (right, other) = split_unit(expected), split_unit(answer)
    if unit is None and other is None:
        return None
    return same_unit(unit, other) and equivalent(left, right)


def _as_members(expected: str, answer: str) -> bool | None:
    if (verdict := compare_matrices(expected, answer, equivalent)) is not None:
        return verdict
    return compare_lists(expected, answer, equivalent)


def _as_sets(expected: str, answer: str) -> bool | None:
    if not SET_WORDS.search(expected) and not SET_WORDS.search(answer):
        return None
    return _same_set(read_set(expected), read_set(answer))


def _same_set(left: sympy.Basic | None, right: sympy.Basic | None) -> bool:
    if not isinstance(left, sympy.Set) or not isinstance(right, sympy.Set):
        return False
    # verify takes an interval for the set of its two ends.
    if isinstance(left, sympy.FiniteSet) != isinstance(right, sympy.FiniteSet):
        return False
    return verify(left, right, timeout_seconds=None)


def _truth_set(chain: Chain) -> sympy.Set | None:
    """The solutions of a truth that is an inequality of one unknown, solved or not."""
    if (solution := solution_set(chain)) is not None:
        return solution
    sides = " ".join(
        f"{side} {relation}"
        for side, relation in zip(chain.sides, (*chain.relations, ""), strict=True)
    )
    relation = read_expression(sides)
    try:
        return relation.as_set() if len(relation.free_symbols) == 1 else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _name_first(chain: Chain) -> Chain:
    if chain.relations != (EQUAL,) or is_name(chain.sides[0]) or not is_name(chain.sides[1]):
        return chain
    return Chain(chain.sides[::-1], chain.relations)
