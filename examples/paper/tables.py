"""published.yaml, typed: the published figures, and the figure of this run for each."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, field_validator, model_validator

from megatron_r1.config.section import Section

PUBLISHED = Path(__file__).with_name("published.yaml")
SECONDS = "seconds"
"""The figure that is a stage's time."""


class Column(Section):
    title: str
    unit: Literal["share", "number", "seconds"]


class PaperRow(Section):
    """One row of a table: what the paper published and what this run got. published: {column: per
    cent or number, or words if no number was published}. ours: {column: `stage.figure`}."""

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
    """Row `above` has the larger published figure. otherwise: the reason if ours differs."""

    column: str
    above: str
    below: str
    otherwise: str


class PaperTable(Section):
    """One table of the paper compared with this run's numbers. curve: figures `stage.NAME` with a
    `NAME@STEP` for several steps."""

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
                    raise ValueError(f"rows.{name}: {column} is none of {', '.join(self.columns)}")
        for comparison in self.compare:
            for name in (comparison.above, comparison.below):
                if name not in self.rows or comparison.column not in self.rows[name].ours:
                    raise ValueError(f"compare: row {name} has no {comparison.column} of ours")
        return self

    @property
    def references(self) -> set[str]:
        return {reference for row in self.rows.values() for reference in row.ours.values()}

    @property
    def stages(self) -> set[str]:
        return {split(reference)[0] for reference in (*self.references, *self.curve)}


class Published(Section):
    paper: str
    tables: dict[str, PaperTable]


def load(path: Path = PUBLISHED) -> Published:
    """Load the tables; raise ValueError for a file that names unknown rows or columns."""
    return Published.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def split(reference: str) -> tuple[str, str]:
    stage, _, figure = reference.partition(".")
    return stage, figure
