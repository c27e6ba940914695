"""Published runs and the plan's predictions for them (`--published`), from published.yaml."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.plan.arguments import config_of, job_of, parse
from megatron_r1.plan.bill import Bill
from megatron_r1.plan.timing import time_section

WIDTH = 120
FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedFigure:
    """A published figure. options: options of megatron-r1 plan that describe the run; number: "run"
    (hours) or a line of the bill's section "time" (seconds); inputs: what the source states;
    assumed: what `options` sets and the source does not state; why: explanation of the
    difference."""

    name: str
    options: str
    number: str
    published: float
    source: str
    inputs: str
    assumed: str
    why: str

    def predicted(self) -> float:
        chosen, overrides = parse(shlex.split(self.options))
        recipe = chosen.recipes[0]
        if self.number == "run":
            return run_hours(recipe, chosen, overrides)
        return time_section(Bill(job_of(recipe, chosen, overrides)).times)[self.number].number


def run_hours(recipe: Path, chosen: argparse.Namespace, overrides: dict) -> float:
    """Return the hours of all steps, each with the settings that rl.schedule gives it."""
    config = config_of(recipe, overrides)
    starts = [step for step, _ in config.phases()]
    ends = [*starts[1:], config.run.steps + 1]
    seconds = [Bill(job_of(recipe, chosen, overrides, step)).step.number for step in starts]
    spent = zip(starts, ends, seconds, strict=True)
    return sum((end - start) * each for start, end, each in spent) / 3600


def rows() -> list[PublishedFigure]:
    """Return the published figures of published.yaml."""
    return [PublishedFigure(**row) for row in yaml.safe_load(FILE.read_text(encoding="utf-8"))]


def table() -> str:
    """Return the comparison as a Markdown table, and under it each row's inputs and explanation.

    Raises UserError outside a checkout of the repository, which has the recipes compared."""
    figures = rows()
    for row in figures:
        if not Path(recipe := shlex.split(row.options)[0]).exists():
            raise UserError(
                f"--published plans recipes of the repository, and {recipe} is not in "
                f"{Path.cwd()}: start it in a checkout",
                key="--published",
                cause=Cause.NOT_FOUND,
            )
    lines = ["| run | predicted | published | ratio |", "|---|---|---|---|"]
    notes = []
    for number, row in enumerate(figures, start=1):
        unit = "h" if row.number == "run" else "s"
        predicted = row.predicted()
        lines.append(
            f"| {number}. {row.name} | {predicted:,.3g} {unit} | {row.published:,.4g} {unit} "
            f"| {predicted / row.published:.2f} |"
        )
        text = (
            f"{number}. Source: {row.source}. Stated: {row.inputs}. Assumed: {row.assumed}. "
            f"Difference: {row.why}."
        )
        notes.append(fill(text, WIDTH, subsequent_indent="   ", break_long_words=False))
    return "\n".join([*lines, "", *notes])
