r"""Lists, sets, tuples, intervals and matrices, compared member by member.

The comparison of two members is an argument (`same`): it is the comparison of whole answers, which
calls these functions.
"""

from collections.abc import Callable

from megatron_r1.rewards.math.relation import EQUAL, MEMBER, SET_WORDS, is_name, read_chain, squeeze
from megatron_r1.rewards.math.structure import (
    SEPARATORS,
    SETS,
    Structure,
    match_all,
    read_matrix,
    read_structure,
    split,
)

Same = Callable[[str, str], bool]
MAX_MEMBERS = 100


def compare_matrices(expected: str, answer: str, same: Same) -> bool | None:
    """Compare shape and cells; None where neither text is a matrix."""
    left, right = read_matrix(expected), read_matrix(answer)
    if left is None or right is None:
        return None if left is right else False
    if [len(row) for row in left] != [len(row) for row in right]:
        return False
    cells = zip(sum(left, []), sum(right, []), strict=True)
    return all(same(*pair) for pair in cells)


def compare_lists(expected: str, answer: str, same: Same) -> bool | None:
    """Compare lists, sets, tuples and intervals; None where neither text is one.

    Sets and bare lists have no order, tuples and intervals have one.
    """
    truth_list, answer_list = _structure(expected), _structure(answer)
    if truth_list is None and answer_list is None:
        return None
    if SET_WORDS.search(expected) or SET_WORDS.search(answer):
        return None
    truth_list = truth_list or Structure("", (expected,))
    answer_list = answer_list or Structure("", (answer,))
    left, right, has_order = _members(truth_list, answer_list)
    left, right = _distinct(left, truth_list), _distinct(right, answer_list)
    if len(left) != len(right) or len(left) > MAX_MEMBERS:
        return False
    pairs = {truth_list.brackets, answer_list.brackets}
    if not has_order and pairs <= {"", *SETS}:
        return match_all(left, right, same)
    # A list may leave out the brackets of a tuple, not those of an interval.
    if len(pairs) > 1 and pairs != {"", "()"}:
        return False
    return all(same(one, other) for one, other in zip(left, right, strict=True))


def _structure(text: str) -> Structure | None:
    r"""Read the structure of `text` without a leading `(x, y) = ` or `x \in `."""
    chain = read_chain(text) if len(split(text, SEPARATORS)) == 1 else None
    if chain is not None and set(chain.relations) <= {EQUAL, MEMBER} and is_name(chain.sides[0]):
        text = chain.sides[-1]
    return read_structure(text)


def _members(truth: Structure, answer: Structure) -> tuple[list[str], list[str], bool]:
    """Return the members of both, and whether names give them an order.

    Names are removed where only one side has them, and where all are the same: `x = 3 or x = -1`.
    """
    (names, left), (other_names, right) = _values(truth), _values(answer)
    if names and other_names and (len(set(names)) > 1 or set(names) != set(other_names)):
        return list(truth.members), list(answer.members), False
    return left, right, max(len(set(names)), len(set(other_names))) > 1


def _values(side: Structure) -> tuple[tuple[str, ...], list[str]]:
    """Return the members' names (none unless all, or only the first, have one) and their values."""
    names: list[str] = []
    values: list[str] = []
    for member in side.members:
        chain = read_chain(member)
        if chain is not None and chain.relations == (EQUAL,) and is_name(chain.sides[0]):
            names.append(squeeze(chain.sides[0]))
            values.append(chain.sides[1])
        else:
            values.append(member)
    if names and len(names) < len(values) and len(names) > 1:
        return (), list(side.members)
    return (tuple(names) if len(names) == len(values) else ()), values


def _distinct(members: list[str], side: Structure) -> list[str]:
    """Return the members; in a list without an order, a repeated member counts once."""
    if side.brackets and not side.is_set:
        return members
    return list({squeeze(member): member for member in members}.values())
