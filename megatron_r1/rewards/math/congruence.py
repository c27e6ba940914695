r"""Congruences, `x \equiv 5 \pmod{7}`, compared by their parts."""

import re
from collections.abc import Callable

from megatron_r1.rewards.math.relation import squeeze

SIDE = r"(?:(?!\\equiv|\\pmod|[=,;]).)*"
CONGRUENCE = re.compile(
    rf"(?:(?P<name>{SIDE})(?:\\equiv(?![A-Za-z])|=))?"
    rf"(?P<residue>(?:(?!\\equiv|\\pmod|=).)+)\\pmod\{{(?P<modulus>[^{{}}]+)\}}"
)


def same_congruence(expected: str, answer: str, same: Callable[[str, str], bool]) -> bool | None:
    """Whether both texts are congruences of one name (which either may leave out), with equal
    residues and moduli; None where neither is a congruence. `same` compares two values."""
    left, right = CONGRUENCE.fullmatch(expected), CONGRUENCE.fullmatch(answer)
    if left is None or right is None:
        return None if left is right else False
    names = {squeeze(name) for name in (left["name"], right["name"]) if name}
    if len(names) > 1:
        return False
    parts = ((left[part].strip(), right[part].strip()) for part in ("modulus", "residue"))
    return all(same(*pair) for pair in parts)
