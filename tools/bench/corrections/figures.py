"""The figures of the study over seeds, as tables and as docs/benchmarks/corrections.md.

Intervals of means, and of mean differences by seed, resample seeds (`evaluation.estimates`); those
of a share of runs are Clopper and Pearson's (`evaluation.fraction_intervals`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_r1.evaluation.estimates import estimate_mean
from megatron_r1.evaluation.fraction_intervals import sampled_fraction
from megatron_r1.reporting.formatting import format_percent
from tools.bench.algorithms import TARGET, WINDOW
from tools.bench.corrections.cells import COMMON_SETTINGS, PARTS, TASKS

PAGE = Path(__file__).with_name("page.md.in")
COLLAPSE_ACCURACY = TARGET / 2
"""A run with a lower held-out accuracy at its end has collapsed, or learned nothing."""
HEADS = (
    "held-out, %",
    "difference",
    "steps to 80%",
    "difference",
    "collapsed",
    "masked",
    "log-probabilities",
)
MANY = 1_000_000
"""Stands for infinitely many runs, of which those of the study are a sample."""

Seeds = Mapping[str, Mapping[str, Any]]
"""The figures of a cell's runs, `runs.run_figures`, by seed."""
Runs = dict[str, dict[str, dict[str, Any]]]
"""`Seeds` by part and cell."""


def steps_to_target(run: Mapping[str, Any]) -> float:
    """Return the steps until 80%; of a run that never had it one more than it has."""
    steps = run["steps_until_target"]
    return float(run["steps"] + 1 if steps is None else steps)


def paired_differences(cell: Seeds, first: Seeds, figure: Any) -> list[float]:
    """Return what a cell's figure is above another's, of each seed that both have.

    Args:
        cell: the runs of the cell.
        first: those of the one that it is compared with.
        figure: function of a run."""
    return [figure(cell[seed]) - figure(first[seed]) for seed in cell if seed in first]


def table_row(cell: Seeds, first: Seeds) -> list[str]:
    """Return the columns of `HEADS` of a cell, compared with the part's first."""
    runs, is_first = list(cell.values()), cell is first
    accuracies = [run["heldout"] for run in runs]
    collapsed = sum(value < COLLAPSE_ACCURACY for value in accuracies)
    share = sampled_fraction(MANY, len(runs), collapsed)
    masked_fractions = [run["masked"] for run in runs if "masked" in run]

    def difference(figure: Any, scale: float, form: str) -> str:
        return (
            ""
            if is_first
            else _format_interval(paired_differences(cell, first, figure), scale, form)
        )

    return [
        _format_interval(accuracies, 100, ".1f"),
        difference(lambda run: run["heldout"], 100, "+.1f"),
        _format_interval([steps_to_target(run) for run in runs], 1, ".1f"),
        difference(steps_to_target, 1, "+.1f"),
        f"{collapsed} of {len(runs)} [{100 * share.low:.0f}, {100 * share.high:.0f}]",
        format_percent(fmean(masked_fractions)) if masked_fractions else "",
        f"{fmean(run['gap'] for run in runs):.2g}",
    ]


def _format_interval(values: Sequence[float], scale: float, form: str) -> str:
    """Return mean and interval, as `81.0 [76.2, 85.8]`."""
    mean = estimate_mean(values)
    ends = [mean.value, mean.low, mean.high]
    value, low, high = (format(scale * (mean.value if end is None else end), form) for end in ends)
    return f"{value} [{low}, {high}]"


def table(cells: Mapping[str, Seeds]) -> str:
    """Return the cells of a part as a Markdown table."""
    lines = [f"| | {' | '.join(HEADS)} |", "|---|" + "---:|" * len(HEADS)]
    first = next(iter(cells.values()))
    for name, seeds in cells.items():
        lines.append(f"| `{name}` | {' | '.join(table_row(seeds, first))} |")
    return "\n".join(lines)


def tables(runs: Runs) -> str:
    """Return the tables of all parts, each under its mismatch."""
    sections = []
    for part, cells in runs.items():
        part_runs = [run for seeds in cells.values() for run in seeds.values()]
        truncated_fraction = fmean(run["truncated"] for run in part_runs)
        about, model = PARTS[part].about, PARTS[part].task
        sections.append(
            f"## {part}\n{about[:1].upper()}{about[1:]}; model: {model}; "
            f"{format_percent(truncated_fraction)} of the answers cut off.\n\n"
            f"{table(cells)}\n"
        )
    return "\n".join(sections)


def as_page(runs: Runs, packages: Mapping[str, str], cores: int) -> str:
    """Return the page with the tables of all parts.

    Args:
        runs: the finished runs.
        packages: the version of each package that matters.
        cores: number of CPU cores."""
    finished_runs = [
        run for cells in runs.values() for seeds in cells.values() for run in seeds.values()
    ]
    counts = sorted({len(seeds) for cells in runs.values() for seeds in cells.values()})
    task_names = {PARTS[part].task for part in runs}
    rl = COMMON_SETTINGS["rl"]
    return PAGE.read_text(encoding="utf-8").format(
        dates=_format_range(sorted({run["date"] for run in finished_runs})),
        commits=", ".join(sorted({run["commit"] for run in finished_runs})),
        cores=cores,
        packages=", ".join(f"{name} {version}" for name, version in packages.items()),
        num_runs=len(finished_runs),
        seeds=_format_range([str(count) for count in counts]),
        core_hours=f"{sum(run['core_seconds'] for run in finished_runs) / 3600:.1f}",
        core_seconds=f"{fmean(run['core_seconds'] for run in finished_runs):.0f}",
        tasks="\n".join(
            f"- `{name}`: {TASKS[name].about}." for name in TASKS if name in task_names
        ),
        steps=COMMON_SETTINGS["run"]["steps"],
        responses=rl["prompts_per_rollout"] * rl["group_size"],
        minibatches=rl["minibatches"],
        rate=f"{COMMON_SETTINGS['optimizer']['learning_rate']:g}",
        questions=COMMON_SETTINGS["data"]["num_heldout"],
        samples=COMMON_SETTINGS["eval"]["samples"],
        before=format_percent(fmean(run["heldout_before"] for run in finished_runs)),
        window=WINDOW,
        target=TARGET,
        collapsed=COLLAPSE_ACCURACY,
        tables=tables(runs),
    )


def _format_range(values: Sequence[str]) -> str:
    """Return the only value, or `first to last`."""
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
