"""The numbers of a stage: read from what it left, none typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_r1.files.jsonl import read_lines
from megatron_r1.reporting.wording import finite, number, percent

FILE = "figures.json"
"""Any stage may leave one: name → number or {value, low, high}, of a share in 0 … 1 or a count."""
NAMES = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "length": "response length",
    "language": "language purity",
    "win_rate": "win rate",
    "loss": "loss",
}
"""What the report calls those that every pipeline may have, in its order."""
PLAIN = ("length", "loss")
"""No shares, whatever their size."""
HELDOUT = {"accuracy": "pass@1", "length": "response_length"}


@dataclass(frozen=True)
class Figure:
    """A number with its 95% interval where one is known. source: the file, and how it came."""

    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def figures_of(folder: Path) -> dict[str, Figure]:
    """All numbers of one stage's folder, of a stage at work too; empty where it has none."""
    metrics = list(read_lines(folder / "metrics.jsonl"))
    evaluations = list(read_lines(folder / "evaluations.jsonl"))
    found = _of_training(metrics)
    if evaluations:
        found |= _of_heldout(max(evaluations, key=lambda line: line["step"]))
    return found | _of_benchmarks(folder / "eval.json") | _own(folder / FILE)


def headline(figures: Mapping[str, Figure]) -> str:
    """The first of a stage's numbers in words, "" without any."""
    for name in [*NAMES, *figures]:
        if name in figures:
            return f"{NAMES.get(name, name)} {worded(name, figures[name])}"
    return ""


def worded(name: str, figure: Figure) -> str:
    """`71.0% (66.2–75.8)`, `1,203 (1,100–1,310)`"""
    if figure.low is None or figure.high is None:
        return worded_value(name, figure.value)
    if is_share(name, figure.value):
        return f"{percent(figure.value)} ({100 * figure.low:.1f}–{100 * figure.high:.1f})"
    return f"{number(figure.value)} ({number(figure.low)}–{number(figure.high)})"


def worded_value(name: str, value: float) -> str:
    return percent(value) if is_share(name, value) else number(value)


def is_share(name: str, value: float) -> bool:
    return name not in PLAIN and 0.0 <= value <= 1.0


@dataclass(frozen=True)
class Spread:
    """One number over seeds; deviation: the sample standard deviation, None of a single seed."""

    mean: float
    deviation: float | None
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), deviation, list(values))

    def worded(self, name: str) -> str:
        """`71.0% ± 1.2`"""
        if self.deviation is None:
            return worded_value(name, self.mean)
        if is_share(name, self.mean):
            return f"{percent(self.mean)} ± {100 * self.deviation:.1f}"
        return f"{number(self.mean)} ± {number(self.deviation)}"


def last_tenth(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean over the last tenth of a curve: single steps are noisy."""
    values = [value for line in metrics if (value := finite(line, key)) is not None]
    return fmean(values[-max(1, len(values) // 10) :]) if values else None


def _of_training(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """What training samples say, for which there may be no held-out evaluation."""
    keys = {"length": "response_length/mean", "language": "language/mean"}
    if not any("reward/mean" in line for line in metrics[-1:]):
        keys["loss"] = "loss"  # of a policy it says nothing
    return {
        name: Figure(value, source=f"metrics.jsonl: {key}, mean of the last tenth of the steps")
        for name, key in keys.items()
        if (value := last_tenth(metrics, key)) is not None
    }


def _of_heldout(line: Mapping[str, Any]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for key in line:
        name = key.removeprefix("eval/")
        value = finite(line, key)
        if name == key or value is None:
            continue
        ours = {measured: short for short, measured in HELDOUT.items()}.get(name, name)
        if name.startswith("cons@"):
            ours = "majority"
        if ours in NAMES:
            ends = [finite(line, f"interval/{name}/{end}") for end in ("low", "high")]
            found[ours] = Figure(value, *ends, source=f"evaluations.jsonl: {key}, last step")
    return found


def _of_benchmarks(path: Path) -> dict[str, Figure]:
    """The benchmarks of an eval: of a single one under the common names, of several by title."""
    if not path.is_file():
        return {}
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    found: dict[str, Figure] = {}
    for title, benchmark in benchmarks.items():
        for metric, estimate in benchmark["metrics"].items():
            name = {"pass@1": "accuracy"}.get(metric, metric)
            if metric == f"cons@{benchmark['samples_per_question']}":
                name = "majority"
            if name not in NAMES:
                continue
            if len(benchmarks) > 1:
                name = title if name == "accuracy" else ""
            if name:
                found[name] = Figure(**estimate, source=f"eval.json: {title}, {metric}")
    return found


def _own(path: Path) -> dict[str, Figure]:
    """Raises ValueError for a file that does not hold figures."""
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): Figure(**(value if isinstance(value, dict) else {"value": float(value)}))
            for name, value in named.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: must hold {{name: number or {{value, low, high}}}}: {error}"
        ) from None
