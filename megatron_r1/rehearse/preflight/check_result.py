"""The result of a check of the preflight, with the hosts that it names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.rehearse.preflight.facts import RankFacts

MAX_LISTED = 6
"""The most ranks, hosts or groups that one problem lists: a choice, so that it stays readable where
half of thousands of ranks are slow."""


@dataclass(frozen=True)
class CheckResult:
    """One row of the table.

    Attributes:
        check: what was measured, and where.
        measured: the figure, as the table shows it.
        expected: the figure that it is compared with.
        level: whether the problem blocks the run, or is a "note"; without one "ok".
        problem: what is wrong and what to do; "" where nothing is.
        hosts: those to replace or repair."""

    check: str
    measured: str
    expected: str = ""
    level: Literal["ok", "note", "block"] = "block"
    problem: str = ""
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.problem:
            object.__setattr__(self, "level", "ok")


def rank_nodes(facts: Iterable[RankFacts]) -> tuple[str, ...]:
    """Return the names of these ranks' nodes, each once."""
    return tuple(dict.fromkeys(rank_facts.host for rank_facts in facts))


def join_values(values: Sequence[object]) -> str:
    """Return the first values, separated by commas, and how many more there are."""
    remainder = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(map(str, values[:MAX_LISTED])) + remainder


def differing_ranks(
    values: Sequence[tuple[RankFacts, str]],
) -> tuple[str, list[tuple[RankFacts, str]]]:
    """Return the value of most ranks, and the ranks that have another, with theirs."""
    majority = Counter(value for _, value in values).most_common(1)[0][0]
    return majority, [(facts, value) for facts, value in values if value != majority]
