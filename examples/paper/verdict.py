"""Whether a published order of two rows is ours too: seed by seed, decided by numbers alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from examples.paper.results import Results
from examples.paper.tables import Comparison, Table
from megatron_r1.workflow.results import Spread


class State(enum.StrEnum):
    AGREES = "agrees"
    """The published order in every seed."""
    DISAGREES = "does not agree"
    """The opposite order in every seed, or no difference in any."""
    UNDECIDED = "not decided"
    """Seeds differ in their order."""
    UNKNOWN = "not known yet"


@dataclass(frozen=True)
class Verdict:
    """gap: of `above` less `below`, a value per seed that has both; None without any."""

    comparison: Comparison
    state: State
    gap: Spread | None

    @property
    def num_in_order(self) -> int:
        return sum(value > 0 for value in self.gap.values) if self.gap else 0


def verdict(table: Table, comparison: Comparison, results: Results) -> Verdict:
    above, below = (
        results.by_seed(table.rows[name].ours[comparison.column])
        for name in (comparison.above, comparison.below)
    )
    gaps = [above[seed] - below[seed] for seed in above if seed in below]
    if not gaps:
        return Verdict(comparison, State.UNKNOWN, None)
    if all(gap > 0 for gap in gaps):
        state = State.AGREES
    elif any(gap > 0 for gap in gaps):
        state = State.UNDECIDED
    else:
        state = State.DISAGREES
    return Verdict(comparison, state, Spread.of(gaps))


def summary(verdicts: list[Verdict]) -> str:
    """The sentence of a table."""
    known = [v for v in verdicts if v.state is not State.UNKNOWN]
    agreeing = [v for v in known if v.state is State.AGREES]
    if not known:
        return "Not known yet: its stages have not been run."
    missing = len(verdicts) - len(known)
    unknown = f" {missing} of {len(verdicts)} comparisons cannot be made yet." if missing else ""
    if len(agreeing) == len(known):
        return f"The direction agrees.{unknown}"
    if not agreeing:
        return f"The direction does not agree.{unknown}"
    return f"The direction agrees in {len(agreeing)} of {len(known)} comparisons.{unknown}"
