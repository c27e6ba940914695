"""Answers that list several values: their members, the names of these, and how they are paired."""

import regex as re  # not Python's: see rewards.py

from r1_grading.math.answer_structure import (
    SEPARATORS,
    Structure,
    read_structure,
    split_top_level,
)
from r1_grading.math.relation import EQUALS_SIGN, MEMBER, bare_name, is_name, read_chain

DOMAIN = re.compile(r"(?P<name>[A-Za-z])\s*\\in\s*\\mathbb\{[A-Z]\}")
LATEX_SYMBOL = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def read_list(text: str) -> Structure | None:
    r"""Read a list, set, tuple or interval; None for any other text.

    It may follow `(x, y) = ` or `x \in `."""
    chain = read_chain(text) if len(split_top_level(text, SEPARATORS)) == 1 else None
    if (
        chain is not None
        and set(chain.relations) <= {EQUALS_SIGN, MEMBER}
        and is_name(chain.sides[0])
    ):
        text = chain.sides[-1]
    return read_structure(text)


def paired_members(truth: Structure, answer: Structure) -> tuple[list[str], list[str], bool]:
    """Return the members of both, and whether names give them an order.

    Names are removed if only one of the two has names, and if all names are the same, as in
    `x = 3 or x = -1`."""
    (names, left), (other_names, right) = _names_and_values(truth), _names_and_values(answer)
    if names and other_names and (len(set(names)) > 1 or set(names) != set(other_names)):
        return list(truth.members), list(answer.members), False
    return left, right, max(len(set(names)), len(set(other_names))) > 1


def _names_and_values(side: Structure) -> tuple[tuple[str, ...], list[str]]:
    """Return the members' names (none unless all, or only the first, have one) and their values."""
    names: list[str] = []
    values: list[str] = []
    for member in side.members:
        chain = read_chain(member)
        if chain is not None and chain.relations == (EQUALS_SIGN,) and is_name(chain.sides[0]):
            names.append(bare_name(chain.sides[0]))
            values.append(chain.sides[1])
        else:
            values.append(member)
    if names and len(names) < len(values) and len(names) > 1:
        return (), list(side.members)
    return (tuple(names) if len(names) == len(values) else ()), values


def lists_relations(text: str) -> bool:
    r"""Whether `text` is a list with commas that has a relation: `x = k\pi, k \in \mathbb{Z}`."""
    parts = split_top_level(text, SEPARATORS)
    if all(joint not in (",", ";") for _, joint in parts):
        return False
    return any(read_chain(part) is not None for part, _ in parts)


def rename_parameter(truth: Structure, answer: Structure) -> Structure:
    r"""Return `answer` with its parameter named as in `truth`.

    The parameter becomes k where the truth is `x = k\pi, k \in \mathbb{Z}` and the answer `x =
    n\pi, n \in \mathbb{Z}`."""
    name, answer_name = _parameter_name(truth), _parameter_name(answer)
    tokens = {token for member in answer.members for token in LATEX_SYMBOL.findall(member)}
    if name is None or answer_name is None or name in tokens:
        return answer
    rename = {answer_name: name}
    members = (
        LATEX_SYMBOL.sub(lambda t: rename.get(t[0], t[0]), member) for member in answer.members
    )
    return Structure(answer.brackets, tuple(members))


def _parameter_name(side: Structure) -> str | None:
    """Return the name whose domain one member gives and whose value none gives, or None."""
    domains = [match["name"] for member in side.members if (match := DOMAIN.match(member))]
    chains = [chain for member in side.members if (chain := read_chain(member)) is not None]
    names_with_value = {
        bare_name(chain.sides[0]) for chain in chains if EQUALS_SIGN in chain.relations
    }
    if len(domains) != 1 or domains[0] in names_with_value:
        return None
    values = [member for member in side.members if read_chain(member) is None]
    is_used = any(domains[0] in LATEX_SYMBOL.findall(value) for value in values)
    return domains[0] if names_with_value or is_used else None


def without_repeats(sides: tuple[Structure, Structure], *members: list[str]) -> list[list[str]]:
    """Return the members of both sides without order, each once unless repeats matter.

    They matter in lists of numbers that both repeat some. `3, 5, 5` is not `3, 3, 5`, but roots may
    be listed with or without their multiplicities."""
    distinct_members = [
        list({bare_name(member): member for member in side}.values()) for side in members
    ]
    both_repeat = all(
        len(few) < len(all_) for few, all_ in zip(distinct_members, members, strict=True)
    )
    if both_repeat and not any(map(_is_set_of_values, sides)):
        return list(members)
    return distinct_members


def _is_set_of_values(side: Structure) -> bool:
    """Whether it is a set, or a list of points, as the solutions of a system are."""
    is_list_of_points = not side.brackets and all(member.startswith("(") for member in side.members)
    return side.is_set or is_list_of_points
