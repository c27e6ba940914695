"""What each stage came to, as a table: one for the page, the same in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.reporting.wording import duration, printable
from megatron_r1.workflow.figures import NAMES, Figure, worded


@dataclass(frozen=True)
class Cell:
    """source: where the number is from, and each seed's own."""

    text: str
    source: str = ""


@dataclass(frozen=True)
class Table:
    """A row per stage that has numbers, its title first; a column per number."""

    heads: list[str]
    rows: list[list[Cell]]
    spread: str
    """What stands behind the numbers."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Table:
        """result: as in report.json."""
        shown = [s for s in result["stages"].values() if s["figures"] and not s["evaluates"]]
        names = {name: None for stage in shown for name in stage["figures"]}
        columns = [n for n in NAMES if n in names] + [n for n in names if n not in NAMES]
        return cls(
            [printable(NAMES.get(name, name)) for name in columns],
            [
                [Cell(printable(stage["title"])), *(_cell(stage, name) for name in columns)]
                for stage in shown
            ],
            "Means over seeds ± their standard deviation."
            if len(result["seeds"]) > 1
            else "In brackets 95% intervals, where an evaluation gave them.",
        )


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table with what it is of: to be pasted into a README."""
    table = Table.of(result)
    runs = [run for stage in result["stages"].values() for run in stage["by_seed"].values()]
    seconds = sum(run["seconds"] or 0.0 for run in runs)
    done = sum(run["state"] == "done" for run in runs)
    lines = [
        f"# {printable(result['title'])}",
        "",
        f"`{result['command']}`, {result['written'][:10]}; seeds "
        f"{', '.join(map(str, result['seeds']))}; {done} of {len(runs)} stages done, "
        f"{duration(seconds)}. {table.spread}",
        "",
        f"| {' | '.join(['stage', *table.heads])} |",
        f"|---|{'---:|' * len(table.heads)}",
    ]
    lines += [f"| {' | '.join(_escaped(cell.text) for cell in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _cell(stage: Mapping[str, Any], name: str) -> Cell:
    if name not in stage["figures"]:
        return Cell("–")
    by_seed = {
        seed: Figure(**run["figures"][name])
        for seed, run in stage["by_seed"].items()
        if name in run["figures"]
    }
    (first, *more) = by_seed.values()
    if not more:
        return Cell(worded(name, first), first.source)
    each = ", ".join(f"seed {seed}: {worded(name, figure)}" for seed, figure in by_seed.items())
    return Cell(stage["figures"][name]["worded"], f"{first.source}; {each}")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
