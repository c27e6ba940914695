"""The members of an answer that is a list, set or tuple, and the names that they may have."""

from megatron_r1.rewards.math.relation import EQUAL, MEMBER, is_name, read_chain, squeeze
from megatron_r1.rewards.math.structure import SEPARATORS, Structure, read_structure, split


def read_list(text: str) -> Structure | None:
    r"""Read a list, set, tuple or interval, which may follow `(x, y) = ` or `x \in `; None for any
    other text."""
    chain = read_chain(text) if len(split(text, SEPARATORS)) == 1 else None
    if chain is not None and set(chain.relations) <= {EQUAL, MEMBER} and is_name(chain.sides[0]):
        text = chain.sides[-1]
    return read_structure(text)


def paired_members(truth: Structure, answer: Structure) -> tuple[list[str], list[str], bool]:
    """Return the members of both, and whether names give them an order.

    Names are removed if only one of the two has names, and if all names are the same, as in
    `x = 3 or x = -1`."""
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


def distinct_members(members: list[str], side: Structure) -> list[str]:
    """Return the members; in a list without an order, a repeated member counts once."""
    if side.brackets and not side.is_set:
        return members
    return list({squeeze(member): member for member in members}.values())
