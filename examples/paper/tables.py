"""The paper's tables: published.yaml, typed, with the published figures and the figure of this run
for each; our figures of finished stages, from a pipeline's report.json, and how they compare."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.section import Section
from megatron_r1.pipeline.results import Spread

PUBLISHED = Path(__file__).with_name("published.yaml")
SECONDS = "seconds"
"""The figure that is a stage's time."""


class Column(Section):
    title: str
    unit: Literal["fraction", "number", "seconds"]


class PaperRow(Section):
    """One row of a table: what the paper published and what this run got.

    Attributes:
        published: {column: per cent or number, or words if no number was published}.
        ours: {column: `stage.figure`}."""

    title: str
    published: dict[str, float | str] = Field(default_factory=dict)
    ours: dict[str, str]

    @field_validator("ours")
    @classmethod
    def _name_a_figure_each(cls, ours: dict[str, str]) -> dict[str, str]:
        for column, reference in ours.items():
            if not all(split(reference)):
                raise ValueError(f"ours.{column}: {reference!r} must be stage.figure")
        return ours


class PaperComparison(Section):
    """Two rows of a column, the one with the larger published figure first.

    Attributes:
        column: the column's name.
        above: the row with the larger published figure.
        below: the other row.
        otherwise: the reason if ours differs.
    """

    column: str
    above: str
    below: str
    otherwise: str


class PaperTable(Section):
    """One table of the paper compared with this run's numbers.

    Attributes:
        curve: figures `stage.NAME` with a `NAME@STEP` for several steps.
    """

    title: str
    source: str
    about: str
    columns: dict[str, Column]
    rows: dict[str, PaperRow]
    compare: list[PaperComparison]
    curve: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_exist(self):
        for name, row in self.rows.items():
            for column in (*row.published, *row.ours):
                if column not in self.columns:
                    known = ", ".join(self.columns)
                    raise ValueError(f"rows.{name}: {column} is not one of {known}")
        for comparison in self.compare:
            for name in (comparison.above, comparison.below):
                if name not in self.rows or comparison.column not in self.rows[name].ours:
                    raise ValueError(
                        f"compare: row {name} has no {comparison.column} among our figures"
                    )
        return self

    @property
    def references(self) -> set[str]:
        return {reference for row in self.rows.values() for reference in row.ours.values()}

    @property
    def stages(self) -> set[str]:
        return {split(reference)[0] for reference in (*self.references, *self.curve)}


class PublishedTables(Section):
    paper: str
    tables: dict[str, PaperTable]


def load_tables(path: Path = PUBLISHED) -> PublishedTables:
    """Load the tables.

    Raises:
        ValueError: the file names unknown rows or columns.
    """
    return PublishedTables.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def split(reference: str) -> tuple[str, str]:
    stage, _, figure = reference.partition(".")
    return stage, figure


@dataclass(frozen=True)
class Results:
    """The results of a pipeline, read from its report.

    Attributes:
        report: as `megatron-r1 pipeline` writes it.
    """

    report: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read report.json.

        Raises:
            UserError: there is none.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: no pipeline has written it; run one first",
                key="report.json",
                cause=Cause.NOT_FOUND,
            )
        return cls(json.loads(path.read_text(encoding="utf-8")))

    @property
    def seeds(self) -> list[str]:
        return [str(seed) for seed in self.report["seeds"]]

    def by_seed(self, reference: str) -> dict[str, float]:
        """Return {seed: value} of `stage.figure`; unfinished stages are left out."""
        name, figure = split(reference)
        stage = self.report["stages"].get(name, {"by_seed": {}})
        found = {}
        for seed, run in stage["by_seed"].items():
            if run["state"] != "done":
                continue
            if figure == SECONDS:
                found[seed] = run["seconds"]
            elif figure in run["figures"]:
                found[seed] = run["figures"][figure]["value"]
        return found

    def spread(self, reference: str) -> Spread | None:
        values = self.by_seed(reference)
        return Spread.from_values(list(values.values())) if values else None

    def curve(self, reference: str) -> dict[int, dict[str, float]]:
        """Return {step: {seed: value}} of the figures `FIGURE@STEP` of `stage.FIGURE`."""
        name, figure = split(reference)
        known = self.report["stages"].get(name, {"figures": {}})["figures"]
        steps = sorted(int(key.split("@")[1]) for key in known if key.startswith(f"{figure}@"))
        found = {step: self.by_seed(f"{reference}@{step}") for step in steps}
        return {step: by_seed for step, by_seed in found.items() if by_seed}

    @property
    def progress(self) -> tuple[int, int, float]:
        """Return the number of finished stages, of all stages, and the seconds."""
        stages = self.report["stages"].values()
        runs = [run for stage in stages for run in stage["by_seed"].values()]
        done = sum(run["state"] == "done" for run in runs)
        return done, len(runs), sum(run["seconds"] or 0.0 for run in runs)


class Agreement(enum.StrEnum):
    """Whether the seeds of a run have the order of two rows that the paper published."""

    AGREES = "agrees"
    """The published order in every seed."""
    DISAGREES = "does not agree"
    """The opposite order in every seed, or no difference in any."""
    UNDECIDED = "not decided"
    """Seeds differ in their order."""
    UNKNOWN = "not known yet"


@dataclass(frozen=True)
class Verdict:
    """Whether the seeds confirm a comparison.

    Attributes:
        gap: `above` minus `below`, one value per seed that has both; None if no seed has.
    """

    comparison: PaperComparison
    state: Agreement
    gap: Spread | None

    @property
    def num_in_order(self) -> int:
        return sum(value > 0 for value in self.gap.values) if self.gap else 0


def verdict(table: PaperTable, comparison: PaperComparison, results: Results) -> Verdict:
    """Return whether a published order of two rows is ours too, seed by seed."""
    sides = (table.rows[name].ours for name in (comparison.above, comparison.below))
    above, below = (results.by_seed(ours[comparison.column]) for ours in sides)
    gaps = [above[seed] - below[seed] for seed in above if seed in below]
    if not gaps:
        return Verdict(comparison, Agreement.UNKNOWN, None)
    if all(gap > 0 for gap in gaps):
        state = Agreement.AGREES
    elif any(gap > 0 for gap in gaps):
        state = Agreement.UNDECIDED
    else:
        state = Agreement.DISAGREES
    return Verdict(comparison, state, Spread.from_values(gaps))


def summary(verdicts: list[Verdict]) -> str:
    """Return a sentence that says how many of the comparisons agree with the paper."""
    known = [v for v in verdicts if v.state is not Agreement.UNKNOWN]
    agreeing = [v for v in known if v.state is Agreement.AGREES]
    if not known:
        return "Not known yet: its stages have not been run."
    missing = len(verdicts) - len(known)
    unknown = f" {missing} of {len(verdicts)} comparisons cannot be made yet." if missing else ""
    if len(agreeing) == len(known):
        return f"The direction agrees.{unknown}"
    if not agreeing:
        return f"The direction does not agree.{unknown}"
    return f"The direction agrees in {len(agreeing)} of {len(known)} comparisons.{unknown}"
