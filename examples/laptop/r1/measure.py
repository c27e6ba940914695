"""Figures of a stage from the responses that `sample` wrote: accuracy, language purity, length, and
the share that a judge prefers to another model's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from r1_grading.reading import response_part

from examples.laptop.r1.judge import prefer
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.evaluation.estimates import estimate_mean

Row = Mapping[str, Any]


def answers(folder: str, samples: str) -> None:
    """Write accuracy, language and length: means over questions, with intervals."""
    by_question = _by_question(samples)
    figures = {
        name: figure([fmean(map(measured, group)) for group in by_question.values()])
        for name, measured in MEASURES.items()
    }
    write_figures(folder, figures)


def wins(folder: str, samples: str, against: str) -> None:
    """Write win_rate over pairs of responses to the same questions; a tie is half a win."""
    own, theirs = _by_question(samples), _by_question(against)
    rates = [win_rate(group, theirs[question]) for question, group in own.items()]
    write_figures(folder, {"win_rate": figure(rates)})


def win_rate(own: Sequence[Row], theirs: Sequence[Row]) -> float:
    """Return how often the judge prefers `own` to `theirs`, responses to one question, in pairs."""
    pairs = zip(own, theirs, strict=True)
    return fmean(prefer(a["question"], _summary_text(a), _summary_text(b)) for a, b in pairs)


MEASURES = {
    "accuracy": lambda row: row["rewards"]["accuracy"],
    "language": lambda row: row["rewards"]["language"],
    "length": lambda row: row["length"],
}


def _by_question(samples: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(Path(samples)):
        found.setdefault(row["id"], []).append(row)
    return found


def _summary_text(row: Row) -> str:
    return response_part(row["response"], "summary", thought_opened=False).text or ""


def figure(values: Sequence[float]) -> dict[str, float | None]:
    return estimate_mean(values).as_json()


def write_figures(folder: str, figures: Mapping[str, Any]) -> None:
    atomic_write(Path(folder) / "figures.json", json.dumps(figures, indent=2) + "\n")
