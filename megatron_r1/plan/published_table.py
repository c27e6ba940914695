"""The plan compared with published runs, as the Markdown tables of `--published`."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.published_calibration import (
    FIRST_GUESSES,
    calibrate_guesses,
    mean_factor,
    range_factor,
    ratios_by_source,
)
from megatron_r1.plan.published_runs import RUNS_FILE, published_runs
from megatron_r1.plan.quantity import Quantity

TABLE_WIDTH = 120


def published_table() -> str:
    """Return what the calibration finds, the comparison of every run, and the errors by source, as
    Markdown tables.

    Raises:
        UserError: this is not a checkout of the repository, which has the recipes compared.
    """
    runs = published_runs()
    for run in runs:
        if not run.recipe.exists():
            raise UserError(
                f"--published plans recipes of the repository, and {run.recipe} is not in "
                f"{Path.cwd()}: start it in a checkout",
                key="--published",
                cause=Cause.NOT_FOUND,
            )
    calibrating_runs = [run for run in runs if run.is_for_calibration]
    values = calibrate_guesses(calibrating_runs)
    width = Assumptions().time_spread
    lines = ["| number | first guess | calibrated | the plan's |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {FIRST_GUESSES[name]:.2g} | {value:.2g} | {getattr(Assumptions(), name):.2g} |"
        for name, value in values.items()
    ]
    spread = range_factor(calibrating_runs, values)
    lines += [f"| time_spread | | {spread:.3f} | {width:.3g} |", ""]
    lines += ["| run | half | predicted | range | published | ratio |", "|---|---|---|---|---|---|"]
    misses = []
    for number, run in enumerate(runs, start=1):
        ratio, value = run.ratio(**values), run.predict(**values)
        prediction = Quantity(value, run.unit, "", value / width, value * width)
        name = f"{number}. {run.system}: {run.name}"
        if not is_in_range(ratio):
            misses.append(f"{name}, {ratio:.2f}")
        lines.append(
            f"| {name} | {'calibrated' if run.is_for_calibration else 'held out'} | {prediction} | "
            f"{prediction.limits} | {Quantity(run.published_value, run.unit)} | {ratio:.2f} |"
        )
    lines += ["", f"outside its range: {'; '.join(misses) or 'none'}", ""]
    lines += ["| source | calibrated | held out | without it |", "|---|---|---|---|"]
    for system, ratios in ratios_by_source(runs, values).items():
        cells = (ratios.calibrated_ratios, ratios.heldout_ratios, ratios.unseen_ratios)
        lines.append(f"| {system} | {' | '.join(map(_error_cell, cells))} |")
    return "\n".join([*lines, "", *_source_notes()])


def is_in_range(ratio: float) -> bool:
    """Return whether a published figure lies in the range of its estimate."""
    return abs(math.log(ratio)) <= math.log(Assumptions().time_spread)


def _error_cell(ratios: Sequence[float]) -> str:
    worst_ratio = max(ratios, key=lambda ratio: abs(math.log(ratio)), default=1.0)
    return f"{len(ratios)}: {mean_factor(ratios):.2f} x, worst {worst_ratio:.2f}"


def _source_notes() -> list[str]:
    text = yaml.safe_load(RUNS_FILE.read_text(encoding="utf-8"))
    return [
        fill(
            f"{source['name']}: {source['source']}. Assumed: {source['assumed']}.",
            TABLE_WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
        )
        for source in text["sources"]
    ]
