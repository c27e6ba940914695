"""The results of a stage: numbers read from the files in its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.reporting.formatting import format_number, format_percent
from megatron_r1.reporting.outcome import first_and_last
from megatron_r1.reporting.record_values import finite_metric

FIGURES_FILE = "figures.json"
"""Any stage may write one: name → number or {value, low, high}, a share in 0 … 1 or a count."""
LABELS = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "length": "response length",
    "language": "language purity",
    "win_rate": "win rate",
    "lc_win_rate": "win rate at equal length",
    "loss": "loss",
}
"""Column heads of the results that several verbs have, in the report's order."""
NOT_FRACTIONS = ("length", "loss")
"""Results that are no fractions, though they may lie in 0 … 1."""
HELDOUT = {"pass@1": "accuracy", "response_length": "length"}
"""Name in evaluations.jsonl → result."""


@dataclass(frozen=True)
class StageResult:
    """A number with its 95% interval where one is known.

    Attributes:
        value: the number.
        low: the lower end of the interval; None where it is not known.
        high: the upper end of the interval; None where it is not known.
        source: the number's file and key."""

    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""

    @property
    def heldout(self) -> bool:
        """Whether it was measured apart from training, not on training's own samples."""
        return not self.source.startswith("metrics.jsonl")

    def format(self, name: str) -> str:
        """Return a result as `71.0% (66.2–75.8)` or `1,203 (1,100–1,310)`.

        Args:
            name: the name of the result."""
        if self.low is None or self.high is None:
            return _format_value(name, self.value)
        if _is_fraction(name, self.value):
            return f"{format_percent(self.value)} ({100 * self.low:.1f}–{100 * self.high:.1f})"
        return f"{format_number(self.value)} ({format_number(self.low)}–{format_number(self.high)})"


@dataclass(frozen=True)
class Spread:
    """One number over seeds.

    Attributes:
        mean: the mean over seeds.
        deviation: sample standard deviation; None of a single seed.
        values: the number of each seed."""

    mean: float
    deviation: float | None
    values: list[float]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Self:
        """Return mean and standard deviation of values; one value has no deviation."""
        deviation = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), deviation, list(values))

    def format(self, name: str) -> str:
        """Return a result as `71.0% ± 1.2`.

        Args:
            name: the name of the result."""
        if self.deviation is None:
            return _format_value(name, self.mean)
        if _is_fraction(name, self.mean):
            return f"{format_percent(self.mean)} ± {100 * self.deviation:.1f}"
        return f"{format_number(self.mean)} ± {format_number(self.deviation)}"


def read_results(folder: Path) -> dict[str, StageResult]:
    """Return the results in a stage's folder, also of a stage that runs; empty without any.

    Raises:
        UserError: figures.json has another form.
    """
    metrics = list(read_lines(folder / "metrics.jsonl"))
    evaluations = list(read_lines(folder / "evaluations.jsonl"))
    results = _training_results(metrics)
    if evaluations:
        results |= _heldout_results(max(evaluations, key=lambda line: line["step"]))
    return (
        results | _benchmark_results(folder / "eval.json") | _figure_results(folder / FIGURES_FILE)
    )


def result_headline(results: Mapping[str, StageResult]) -> str:
    """Return a stage's first result with its label, "" without any."""
    for name in [*LABELS, *results]:
        if name in results:
            return f"{LABELS.get(name, name)} {results[name].format(name)}"
    return ""


def _format_value(name: str, value: float) -> str:
    """Format a result: as a percentage if it is a fraction, else with three digits."""
    return format_percent(value) if _is_fraction(name, value) else format_number(value)


def _is_fraction(name: str, value: float) -> bool:
    """Return whether a result is a fraction of 1, by its name and value."""
    return name not in NOT_FRACTIONS and 0.0 <= value <= 1.0


def _training_results(metrics: Sequence[Mapping[str, Any]]) -> dict[str, StageResult]:
    """Return results on training samples, which a held-out evaluation overrides."""
    keys = {"length": "response_length/mean", "language": "language/mean"}
    if not any("reward/mean" in line for line in metrics[-1:]):
        keys["loss"] = "loss"  # a policy-gradient loss is no measure of quality
    return {
        name: StageResult(
            ends[1], source=f"metrics.jsonl: {key}, mean of the last tenth of the steps"
        )
        for name, key in keys.items()
        if (ends := first_and_last(metrics, key))
    }


def _heldout_results(line: Mapping[str, Any]) -> dict[str, StageResult]:
    results: dict[str, StageResult] = {}
    for key in line:
        metric, value = key.removeprefix("eval/"), finite_metric(line, key)
        if metric == key or value is None:
            continue
        name = "majority" if metric.startswith("cons@") else HELDOUT.get(metric, metric)
        if name in LABELS:
            low, high = (finite_metric(line, f"interval/{metric}/{end}") for end in ("low", "high"))
            results[name] = StageResult(value, low, high, f"evaluations.jsonl: {key}, last step")
    return results


def _benchmark_results(path: Path) -> dict[str, StageResult]:
    """Return the results of an eval: of one benchmark by the common names, of several by title."""
    if not path.is_file():
        return {}
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    results: dict[str, StageResult] = {}
    for title, benchmark in benchmarks.items():
        majority = f"cons@{benchmark['samples_per_question']}"
        for metric, estimate in benchmark["metrics"].items():
            name = {"pass@1": "accuracy", majority: "majority"}.get(metric, metric)
            if len(benchmarks) > 1:
                name = title if name in ("accuracy", "lc_win_rate") else ""
            elif name not in LABELS:
                name = ""
            if name:
                results[name] = StageResult(**estimate, source=f"eval.json: {title}, {metric}")
    return results


def _figure_results(path: Path) -> dict[str, StageResult]:
    if not path.is_file():
        return {}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): _parse_figure(name, value) for name, value in figures.items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: must hold {{name: number or {{value, low, high}}}}: {error}",
            key=path.name,
            cause=Cause.MALFORMED,
        ) from None


def _parse_figure(name: str, figure: Any) -> StageResult:
    """Return the result of an entry of figures.json.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is not finite; low and high may be null.
    """
    result = StageResult(**(figure if isinstance(figure, dict) else {"value": float(figure)}))
    ends = [end for end in (result.low, result.high) if end is not None]
    if not all(math.isfinite(number) for number in (result.value, *ends)):
        raise ValueError(f"{name} is {figure!r}, which has no finite number")
    return result
