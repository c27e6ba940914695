"""Figures of a stage from answers that `sample` wrote: accuracy, language purity, length, and how
often a judge prefers them to another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.laptop.r1.judge import prefer
from megatron_r1.evaluation.estimators import estimate
from megatron_r1.files import atomic_write
from megatron_r1.files.jsonl import read_lines
from megatron_r1.rewards.remote.response_text import response_part


def answers(folder: str, samples: str) -> None:
    """accuracy, language, length: means over questions, with intervals."""
    by_question = _by_question(samples)
    figures = {
        name: _figure([fmean(map(measured, group)) for group in by_question.values()])
        for name, measured in MEASURES.items()
    }
    _write(folder, figures)


def wins(folder: str, samples: str, against: str) -> None:
    """win_rate: of the answers to the same questions, one by one; a tie is half a win."""
    own, theirs = _by_question(samples), _by_question(against)
    points = [
        fmean(
            prefer(mine["question"], _summary(mine), _summary(other))
            for mine, other in zip(group, theirs[question], strict=True)
        )
        for question, group in own.items()
    ]
    _write(folder, {"win_rate": _figure(points)})


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


def _summary(row: Mapping[str, Any]) -> str:
    return response_part(row["response"], "summary", opened=False).text or ""


def _figure(values: list[float]) -> dict[str, float | None]:
    mean = estimate(values)
    return {"value": mean.value, "low": mean.low, "high": mean.high}


def _write(folder: str, figures: Mapping[str, Any]) -> None:
    atomic_write(Path(folder) / "figures.json", json.dumps(figures, indent=2) + "\n")
