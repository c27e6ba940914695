r"""Whether two answers mean the same, decided by the first rule that applies.

`compare_answers` has the rules for text: units, dates, choices, words. `same_meaning` has the
rules for mathematics: numbers, equations and inequalities, lists and matrices, sets, and last
expressions, by a computer algebra system. An answer that can be read in two ways is wrong."""

import functools
import re

import sympy
from math_verify import verify

from r1_grading.math import worded_answers
from r1_grading.math.answer_structure import (
    SEPARATORS,
    SETS,
    WITH_THOUSANDS,
    Structure,
    match_all,
    read_matrix,
    read_structure,
    split_top_level,
    without_thousands,
)
from r1_grading.math.list_members import (
    lists_relations,
    paired_members,
    read_list,
    rename_parameter,
    without_repeats,
)
from r1_grading.math.normalization import normalize_latex, strip_styling
from r1_grading.math.number import PERCENT, read_number, same_number
from r1_grading.math.number_words import words_to_number
from r1_grading.math.refusal import (
    is_division,
    is_unfinished,
    last_value_of_computation,
    parser_refusal_reason,
)
from r1_grading.math.relation import (
    APPROX,
    EQUALS_SIGN,
    MEMBER,
    SET_WORDS,
    Chain,
    bare_name,
    is_asked_quantity,
    is_name,
    read_chain,
    read_exclusion,
    read_set,
    relation_name,
    same_congruence,
    same_operands,
    same_relation,
    set_builder_condition,
    solution_set,
)
from r1_grading.math.symbolic import constant_value, read_expression, same_expression
from r1_grading.math.units import degrees_to_radians, same_unit, split_han_unit, split_unit
from r1_grading.reading.tags_and_boxes import unwrap_answer

TILDE_NUMBER = re.compile(r"~\s*\d")
"""An answer that is only near a number, `~204`; elsewhere a tilde is one of LaTeX's spaces."""
INEQUALITY = re.compile(r"[<>]|\\[lg]eq(?![A-Za-z])")
APPROXIMATION = 0.01
"""Largest relative error of a number after `\\approx`."""

MAX_MEMBERS = 100
"""The most members of a list that is compared: `match_all` may compare each member with every other
one."""
Result = tuple[bool, str]
"""Whether the answer is right, and why it was refused instead of compared ("" if compared)."""


def compare_answers(truth: str, answer: str) -> Result:
    """Compare `answer` with `truth`. Runs sympy: call it only within limits of time and memory."""
    expected, expected_unit = split_han_unit(unwrap_answer(strip_styling(truth)))
    answer, answer_unit = split_han_unit(unwrap_answer(strip_styling(answer)))
    if not same_unit(expected_unit, answer_unit):
        return False, ""
    if TILDE_NUMBER.match(answer):
        return False, "not committed"
    expected, answer = words_to_number(expected), words_to_number(answer)
    if (moment := worded_answers.read_moment(expected)) is not None:
        return moment == worded_answers.read_moment(answer), ""
    expected, answer = worded_answers.read_phrase(expected), worded_answers.read_phrase(answer)
    letters = worded_answers.read_letters(expected)
    if letters is not None and letters == worded_answers.read_letters(answer):
        return True, ""
    choice = worded_answers.read_choice(expected)
    if choice is not None and worded_answers.is_letter(expected):
        return worded_answers.same_letter(choice[0], answer), ""
    is_words = worded_answers.is_words(expected, truth)
    is_same = worded_answers.same_words(expected, answer, ignore_case=is_words)
    if is_same or is_words or worded_answers.is_order(expected):
        return is_same, ""
    if choice is not None and choice[1]:
        return _compare_labelled(choice, answer)
    if (unlabelled_answer := worded_answers.without_label(answer)) is not None:
        answer = unlabelled_answer
    expected = set_builder_condition(normalize_latex(expected))
    answer = set_builder_condition(normalize_latex(answer))
    answer = last_value_of_computation(expected, answer)
    expected = degrees_to_radians(expected)
    if ("," in expected) != ("," in answer):  # then those of the one separate thousands
        expected, answer = without_thousands(expected), without_thousands(answer)
    if expected == answer:
        return True, ""
    if (same_value := _compare_numbers(expected, answer)) is not None:
        is_open = not same_value and is_division(expected, answer)
        return same_value, "a division is left open" if is_open else ""
    if (reason := parser_refusal_reason(expected, answer)) is not None:
        return False, reason
    return same_meaning(expected, answer), ""


def same_meaning(expected: str, answer: str, *, must_be_evaluated: bool = True) -> bool:
    """Whether two spelled texts, neither refused, mean the same; recursive over their structure.

    Args:
        expected: the truth, spelled.
        answer: the response's answer, spelled.
        must_be_evaluated: whether a number has to be worked out. It need not be in a step, as in
            `2 + 11 = 13`."""
    # First, as most answers are written numbers: these are compared some hundred times faster.
    if (
        verdict := _compare_numbers(expected, answer, must_be_evaluated=must_be_evaluated)
    ) is not None:
        return verdict
    for rule in RULES:
        if (verdict := rule(expected, answer)) is not None:
            return verdict
    if must_be_evaluated and is_unfinished(expected, answer):
        return False
    return same_expression(expected, answer)


def _compare_labelled(expected: tuple[str, str], answer: str) -> Result:
    """Compare with a choice and its text, `(C) 12`: the answer may be its letter, text or both."""
    choice = worded_answers.read_choice(answer)
    if choice is None:
        return compare_answers(expected[1], answer)
    if choice[0] != expected[0]:
        return False, ""
    return compare_answers(expected[1], choice[1]) if choice[1] else (True, "")


def _compare_numbers(expected: str, answer: str, *, must_be_evaluated: bool = True) -> bool | None:
    """Compare two written numbers exactly; None where one of the texts is not a written number."""
    left = read_number(expected)
    right = read_number(answer) if left is not None else None
    if left is None or right is None:
        return None
    if must_be_evaluated and is_division(expected, answer):
        return False
    return same_number(left, right)


def _compare_alternatives(expected: str, answer: str) -> bool | None:
    r"""Return True for one value written in several ways, `0.5 or 1/2`, else None."""
    parts = [part for part, _ in split_top_level(answer, SEPARATORS) if part]
    if len(parts) < 2 or len(split_top_level(expected, SEPARATORS)) > 1 or len(parts) > MAX_MEMBERS:
        return None
    return True if all(same_meaning(expected, part) for part in parts) else None


def _compare_exclusions(expected: str, answer: str) -> bool | None:
    r"""Compare `x \neq 1, 2` with another text like it, or with the set of all other numbers.

    None where neither text excludes values."""
    left, right = read_exclusion(expected), read_exclusion(answer)
    if left is None or right is None:
        if left is right or not SET_WORDS.search(expected if left is None else answer):
            return None
        values = [read_expression(value) for value in (left or right or ("", []))[1]]
        if not all(isinstance(value, sympy.Expr) for value in values):
            return False
        complement = sympy.Complement(sympy.S.Reals, sympy.FiniteSet(*values))
        return _same_set(read_set(expected if left is None else answer), complement)
    return left[0] == right[0] and match_all(left[1], right[1], same_meaning)


def _compare_relations(expected: str, answer: str) -> bool | None:
    """Compare equations, inequalities and memberships; None where neither text is one."""
    # Each of `x = 1, x = 2` is compared as a member of a list.
    if (
        len(split_top_level(expected, SEPARATORS)) > 1
        or len(split_top_level(answer, SEPARATORS)) > 1
    ):
        return None
    truth_chain, answer_chain = read_chain(expected), read_chain(answer)
    if answer_chain is not None and APPROX in answer_chain.relations:
        return _answer_is_approximated(expected, answer_chain)
    if truth_chain is not None and APPROX in truth_chain.relations:
        sides = truth_chain.sides
        return same_meaning(sides[-1], answer) if is_name(sides[0]) else None
    if truth_chain is None:
        return None if answer_chain is None else _answer_is_relation(expected, answer_chain)
    if answer_chain is None:
        return _truth_is_relation(truth_chain, answer)
    return _both_are_relations(truth_chain, answer_chain)


def _truth_is_relation(truth: Chain, answer: str) -> bool:
    """Compare where the answer leaves the name out: 3 for x = 3, (1, 2) for 1 < x < 2."""
    if set(truth.relations) <= {EQUALS_SIGN, MEMBER}:
        names = [is_name(side) for side in truth.sides]
        if all(names[:-1]):
            return same_meaning(truth.sides[-1], answer)
        return (
            len(names) == 2 and names[1] and not names[0] and same_meaning(truth.sides[0], answer)
        )
    return _same_set(_truth_set(truth), read_expression(answer))


def _answer_is_relation(expected: str, answer: Chain) -> bool:
    """Each side of the answer must be a name or equal the truth: x = 3 for 3."""
    if set(answer.relations) <= {EQUALS_SIGN, MEMBER}:
        value = answer.sides[-1]
        if is_asked_quantity(value) and not is_name(answer.sides[0]) and len(answer.sides) == 2:
            return same_meaning(expected, answer.sides[0])
        steps_before = [side for side in answer.sides[:-1] if not is_asked_quantity(side)]
        steps = all(same_meaning(expected, side, must_be_evaluated=False) for side in steps_before)
        return steps and same_meaning(expected, value)
    solution = solution_set(answer)
    return solution is not None and _same_set(read_expression(expected), solution)


def _both_are_relations(truth: Chain, answer: Chain) -> bool:
    if set(truth.relations) | set(answer.relations) <= {EQUALS_SIGN, MEMBER}:
        truth, answer = _name_first(truth), _name_first(answer)
        names = truth.sides[0], answer.sides[0]
        if all(map(is_name, names)) and bare_name(names[0]) == bare_name(names[1]):
            value_sides = [side for side in answer.sides[1:] if not is_name(side)]
            if not value_sides or not same_meaning(truth.sides[-1], value_sides[-1]):
                return False
            return all(
                same_meaning(truth.sides[-1], s, must_be_evaluated=False) for s in value_sides[:-1]
            )
    if MEMBER in truth.relations or MEMBER in answer.relations:
        member, relation = (truth, answer) if MEMBER in truth.relations else (answer, truth)
        if MEMBER in relation.relations or bare_name(member.sides[0]) not in bare_name(
            str(relation.sides)
        ):
            return False
        solution = solution_set(relation) if relation is answer else _truth_set(relation)
        return _same_set(read_expression(member.sides[-1]), solution)
    return same_relation(truth, answer)


def _answer_is_approximated(expected: str, answer: Chain) -> bool:
    r"""`x = 2/3 \approx 0.67`: the exact side counts, and the numbers must be near it."""
    if not set(answer.relations) <= {EQUALS_SIGN, APPROX}:
        return False
    approx_index = answer.relations.index(APPROX)
    approx_index += approx_index == 0 and is_asked_quantity(answer.sides[0])
    value = constant_value(answer.sides[approx_index])
    exact_sides = [side for side in answer.sides[: approx_index + 1] if not is_asked_quantity(side)]
    if not value or not all(same_meaning(expected, side) for side in exact_sides):
        return False
    approximations = [read_number(side) for side in answer.sides[approx_index + 1 :]]
    return all(
        number is not None
        and abs(number.value.numerator / value / number.value.denominator - 1) <= APPROXIMATION
        for number in approximations
    )


def _compare_units(expected: str, answer: str) -> bool | None:
    """Compare values with units; None where neither text has a unit."""
    (left, left_unit), (right, right_unit) = split_unit(expected), split_unit(answer)
    if left_unit is None and right_unit is None:
        return None
    # A missing unit agrees with any, but a share is no length: `5%` is not `5 cm`.
    if PERCENT.search(expected if left_unit is None else answer):
        return False
    if (radians := _radian_pair(left, left_unit, right, right_unit)) is not None:
        return same_meaning(*radians)
    return same_unit(left_unit, right_unit) and same_meaning(left, right)


def _radian_pair(
    left: str, left_unit: str | None, right: str, right_unit: str | None
) -> tuple[str, str] | None:
    r"""Return both angles in radians where one is in degrees and the other a multiple of \pi.

    Returns:
        The two numbers, or None for other units."""
    if left_unit == "°" and right_unit in (None, "rad") and r"\pi" in right:
        left = rf"\frac{{({left})\pi}}{{180}}"
    elif right_unit == "°" and left_unit in (None, "rad") and r"\pi" in left:
        right = rf"\frac{{({right})\pi}}{{180}}"
    else:
        return None
    return left, right


def _compare_matrices(expected: str, answer: str) -> bool | None:
    """Compare shape and cells; None where neither text is a matrix."""
    left, right = read_matrix(expected), read_matrix(answer)
    if left is None or right is None:
        if left is right:
            return None
        column, vector_text = (left, answer) if right is None else (right, expected)
        vector = read_structure(vector_text)
        if vector is None or vector.brackets != "()" or {len(row) for row in column or ()} != {1}:
            return False
        left, right = column or [], [[member] for member in vector.members]
    if [len(row) for row in left] != [len(row) for row in right]:
        return False
    cells = zip(sum(left, []), sum(right, []), strict=True)
    return all(same_meaning(*pair) for pair in cells)


def _compare_conditions(expected: str, answer: str) -> bool | None:
    """Compare several conditions, `x > 2 and x < 3`, with one text for their set, `2 < x < 3`.

    None where neither or both of the texts are several conditions, and where one is no set."""
    parts = [split_top_level(text, SEPARATORS) for text in (expected, answer)]
    conditions = max(parts, key=len)
    if min(map(len, parts)) > 1 or len(conditions) == 1 or read_chain(conditions[0][0]) is None:
        return None
    sets = read_set(expected), read_set(answer)
    if not all(isinstance(condition_set, sympy.Set) for condition_set in sets):
        return None
    return len({relation_name(expected), relation_name(answer), ""}) < 3 and _same_set(*sets)


def _compare_lists(expected: str, answer: str) -> bool | None:
    """Compare lists, sets, tuples and intervals; None where neither text is one.

    Sets and bare lists have no order, tuples and intervals have one."""
    truth_list, answer_list = read_list(expected), read_list(answer)
    if truth_list is None and answer_list is None:
        return None
    # Not by members: `(0, 1) \cup (1, 2)` may be written in another order (`_compare_sets`).
    has_sets = any(map(SET_WORDS.search, (expected, answer)))
    if has_sets and not any(map(lists_relations, (expected, answer))):
        return None
    # `x > 1 and x < 2` and `x > 1 or x < 2` have the same members, and are different sets.
    if INEQUALITY.search(expected) and INEQUALITY.search(answer):
        words = [
            {word for _, word in split_top_level(text, SEPARATORS)} for text in (expected, answer)
        ]
        if "and" in words[0] ^ words[1] and "or" in words[0] ^ words[1]:
            return False
    truth_list = truth_list or Structure("", (expected,))
    answer_list = answer_list or Structure("", (answer,))
    answer_list = rename_parameter(truth_list, answer_list)
    left, right, has_order = paired_members(truth_list, answer_list)
    pairs = {truth_list.brackets, answer_list.brackets}
    has_order |= not pairs <= {"", *SETS} or WITH_THOUSANDS.fullmatch(expected) is not None
    if not has_order:
        left, right = without_repeats((truth_list, answer_list), left, right)
    if len(left) != len(right) or len(left) > MAX_MEMBERS:
        return False
    if not has_order:
        return match_all(left, right, same_meaning)
    # A list may leave out the brackets of a tuple, not those of an interval.
    if len(pairs) > 1 and pairs != {"", "()"}:
        return False
    return all(
        same_meaning(truth_member, answer_member)
        for truth_member, answer_member in zip(left, right, strict=True)
    )


def _compare_sets(expected: str, answer: str) -> bool | None:
    """Compare unions, complements and named sets; None where neither text has one."""
    if not SET_WORDS.search(expected) and not SET_WORDS.search(answer):
        return None
    return same_operands(expected, answer) or _same_set(read_set(expected), read_set(answer))


def _same_set(left: sympy.Basic | None, right: sympy.Basic | None) -> bool:
    if not isinstance(left, sympy.Set) or not isinstance(right, sympy.Set):
        return False
    # verify finds an interval equal to the set of its two ends.
    if isinstance(left, sympy.FiniteSet) != isinstance(right, sympy.FiniteSet):
        return False
    return verify(left, right, timeout_seconds=None)


def _truth_set(chain: Chain) -> sympy.Set | None:
    """Return the solutions of a truth that is an inequality of one unknown, solved or not."""
    if (solution := solution_set(chain)) is not None:
        return solution
    pairs = zip(chain.sides, (*chain.relations, ""), strict=True)
    inequality = read_expression(" ".join(f"{side} {relation}" for side, relation in pairs))
    if inequality is None:
        return None
    try:
        return inequality.as_set() if len(inequality.free_symbols) == 1 else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _name_first(chain: Chain) -> Chain:
    if chain.relations != (EQUALS_SIGN,) or is_name(chain.sides[0]) or not is_name(chain.sides[1]):
        return chain
    return Chain(chain.sides[::-1], chain.relations)


# In this order: `0.5 or 1/2` would be a list of two members, where one value is expected.
RULES = (
    functools.partial(same_congruence, is_equal=same_meaning),
    _compare_alternatives,
    _compare_exclusions,
    _compare_relations,
    _compare_units,
    _compare_matrices,
    _compare_conditions,
    _compare_lists,
    _compare_sets,
)
