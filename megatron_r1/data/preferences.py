"""What reward models learn from: pairs of responses to a question, or responses with a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1.data.records import Record, read_records, require_text

Kind = Literal["pairwise", "pointwise"]


@dataclass(frozen=True)
class Preference:
    """One row: responses to a question, each with its label, the good one of a pair first.

    opened: the prompt ended with `<think>`, which the responses then do not repeat. place: its file
    and line.
    """

    question: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    opened: bool
    place: str


def read_preferences(
    path: str | Path, kind: Kind, columns: Mapping[str, str] | None = None
) -> Iterator[Preference]:
    """The rows of a JSONL or Parquet file: {"question", "chosen", "rejected"} for pairwise,
    {"question", "response", "label"} for pointwise, label 1 or true for a good response, 0 or false
    for a bad one. "prompt" may stand for "question"; {"opened": true} as `Preference` says.

    Raises ValueError with file and line for a bad row.
    """
    names = ("question", "prompt", "chosen", "rejected", "response", "label", "opened")
    for place, row in read_records(path, columns, names):
        question = require_text(place, row, "prompt" if "question" not in row else "question")
        opened = row.get("opened", False)
        if not isinstance(opened, bool):
            raise ValueError(f"{place}: 'opened' must be true or false, it is {opened!r}")
        if kind == "pairwise":
            responses = tuple(require_text(place, row, name) for name in ("chosen", "rejected"))
            if responses[0] == responses[1]:
                raise ValueError(f"{place}: 'chosen' and 'rejected' are the same text")
            labels: tuple[float, ...] = (1.0, 0.0)
        else:
            responses, labels = (require_text(place, row, "response"),), (_label(place, row),)
        yield Preference(question, responses, labels, opened, place)


def _label(place: str, row: Record) -> float:
    label: Any = row.get("label")
    if isinstance(label, int | float) and label in (0, 1):  # booleans are integers
        return float(label)
    found = f"is {label!r}" if "label" in row else f"is missing (has {', '.join(row)})"
    raise ValueError(f"{place}: 'label' must be 1 or true for a good response, else 0; it {found}")
