"""Data of single rows: what a stage of paper.yaml learns from, made of what another left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_r1.files import atomic_write
from megatron_r1.files.jsonl import read_lines


def first(folder: str, examples: str, count: int) -> None:
    """sft.jsonl: the first `count` of `examples`. Raises ValueError where there are fewer."""
    rows = list(read_lines(Path(examples)))
    if len(rows) < count:
        raise ValueError(f"{examples}: {count} examples are wanted, and there are {len(rows)}")
    _write(Path(folder) / "sft.jsonl", rows[:count])


def of_kind(folder: str, questions: str, kind: str) -> None:
    """questions.jsonl: those that the reward `kind` grades."""
    rows = [row for row in read_lines(Path(questions)) if row["kind"] == kind]
    _write(Path(folder) / "questions.jsonl", rows)


def right_and_wrong(folder: str, samples: str) -> None:
    """pairs.jsonl for `reward-model`: of each question its right answers with as many wrong ones,
    so that people who know the truth would prefer the first of a pair."""
    rows = sorted(read_lines(Path(samples)), key=lambda row: (row["id"], row["index"]))
    _write(Path(folder) / "pairs.jsonl", _pairs(rows))


def _pairs(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    for _, answers in groupby(rows, key=lambda row: row["id"]):
        sides: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
        for answer in answers:
            if answer["rewards"] and answer["response"].strip():  # else there is nothing to compare
                sides[answer["rewards"]["accuracy"] == 1.0].append(answer)
        for right, wrong in zip(sides[True], sides[False], strict=False):
            texts = {"chosen": right["response"], "rejected": wrong["response"]}
            yield {"question": right["question"], **texts}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
