"""The members of an answer that is a list, set or tuple, and the names that they may have."""

import re

from megatron_r1.rewards.math.relation import EQUAL, MEMBER, is_name, read_chain, squeeze
from megatron_r1.rewards.math.structure import SEPARATORS, Structure, read_structure, split

DOMAIN = re.compile(r"(?P<name>[A-Za-z])\s*\\in\s*\\mathbb\{[A-Z]\}")
SYMBOL = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


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


def lists_relations(text: str) -> bool:
    r"""Whether `text` is a list with commas that has a relation: `x = k\pi, k \in \mathbb{Z}`."""
    parts = split(text, SEPARATORS)
    if all(joint not in (",", ";") for _, joint in parts):
        return False
    return any(read_chain(part) is not None for part, _ in parts)


def with_parameter_of(truth: Structure, answer: Structure) -> Structure:
    r"""Return `answer` with its parameter named as in `truth`: with k where the truth is
    `x = k\pi, k \in \mathbb{Z}` and the answer `x = n\pi, n \in \mathbb{Z}`."""
    name, other = _parameter(truth), _parameter(answer)
    tokens = {token for member in answer.members for token in SYMBOL.findall(member)}
    if name is None or other is None or name in tokens:
        return answer
    rename = {other: name}
    members = (SYMBOL.sub(lambda t: rename.get(t[0], t[0]), member) for member in answer.members)
    return Structure(answer.brackets, tuple(members))


def _parameter(side: Structure) -> str | None:
    """Return the name whose domain one member gives and whose value none gives, or None."""
    domains = [match["name"] for member in side.members if (match := DOMAIN.match(member))]
    chains = [chain for member in side.members if (chain := read_chain(member)) is not None]
    given = {squeeze(chain.sides[0]) for chain in chains if EQUAL in chain.relations}
    if len(domains) != 1 or domains[0] in given:
        return None
    values = [member for member in side.members if read_chain(member) is None]
    is_used = any(domains[0] in SYMBOL.findall(value) for value in values)
    return domains[0] if given or is_used else None


def without_repeats(sides: tuple[Structure, Structure], *members: list[str]) -> list[list[str]]:
    """Return the members of both sides without order, each once unless it matters how often they
    are written: in lists of numbers that both repeat some. `3, 5, 5` is not `3, 3, 5`, but roots
    may be listed with or without their multiplicities."""
    once = [list({squeeze(one): one for one in side}.values()) for side in members]
    both_repeat = all(len(few) < len(all_) for few, all_ in zip(once, members, strict=True))
    if both_repeat and not any(map(_is_set_of_values, sides)):
        return list(members)
    return once


def _is_set_of_values(side: Structure) -> bool:
    """Whether it is a set, or a list of points, as the solutions of a system are."""
    is_list_of_points = not side.brackets and all(one.startswith("(") for one in side.members)
    return side.is_set or is_list_of_points
