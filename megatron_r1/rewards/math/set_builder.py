r"""Sets by their condition, `\{x \mid x > 2\}`, and excluded values, `x \neq 1, 2`, as text."""

import re

from megatron_r1.rewards.math.relation import is_name, read_chain, squeeze
from megatron_r1.rewards.math.structure import SEPARATORS, read_structure, split

SET_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[a-z])\s*(?P<real>\\in\s*\\mathbb\s*\{R\}\s*)?(?:\\mid|\||:)\s*"
    r"(?:(?P=name)\s*\\in\s*\\mathbb\s*\{R\}\s*,\s*)?(?P<condition>.*)\\\}"
)
SUCH_THAT = re.compile(r"(?<=\\\{)([^{}|:\\]*)(?::|\|)(?=.*\\\}$)")


def condition(text: str) -> str:
    r"""Return the condition of a set of numbers, x > 2 of `\{x \mid x > 2\}`; else `text`."""
    match = SET_BUILDER.fullmatch(text)
    return SUCH_THAT.sub(r"\1\\mid", text) if match is None else match["condition"].strip()


def excluded(text: str) -> tuple[str, list[str]] | None:
    r"""Return the name and the values of `x \neq 1, 2` and `x \neq 1, x \neq 2`."""
    chains = [part.partition(r"\neq") for part, _ in split(text, SEPARATORS) if part]
    names = {squeeze(name) for name, unequal, _ in chains if unequal}
    if len(names) != 1 or not chains[0][1] or not is_name(chains[0][0]):
        return None
    if any(read_chain(name) is not None for name, unequal, _ in chains if not unequal):
        return None  # `x \neq 1, x > 0`
    values = [value.strip() if unequal else name for name, unequal, value in chains]
    listed = read_structure(", ".join(values))  # reads \pm, too
    return names.pop(), list(listed.members) if listed else values
