"""Figures no stage has by itself: accuracy while learning, majority votes, what a judge prefers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.laptop.r1.judge import prefer
from megatron_r1.evaluation.estimators import estimate, subsets
from megatron_r1.evaluation.voting import can_vote, majority_of, read_vote
from megatron_r1.files import atomic_write
from megatron_r1.files.jsonl import read_lines
from megatron_r1.rewards.remote.response_text import response_part

Row = Mapping[str, Any]


def learning(folder: str, **runs: str) -> None:
    """NAME: mean accuracy of the answers of all steps of a run, given its metrics.jsonl. Where all
    runs end with what the base model can do, it tells which came there sooner."""
    means = {
        name: fmean(line["accuracy"] for line in read_lines(Path(metrics)))
        for name, metrics in runs.items()
    }
    _write(folder, {name: {"value": mean} for name, mean in means.items()})


def votes(folder: str, samples: str, sizes: list[int]) -> None:
    """majority@N: share of the questions whose majority of N answers is right, mean over sets of N
    of a question's answers; for those questions whose answers can be compared."""
    rows = sorted(read_lines(Path(samples)), key=lambda row: (row["id"], row["index"]))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["id"])]
    groups = [group for group in groups if can_vote(group[0]["kind"])]
    figures = {f"majority@{n}": _figure([voted(group, n) for group in groups]) for n in sizes}
    _write(folder, figures)


def voted(answers: Sequence[Row], size: int) -> float:
    """How often the majority of `size` of these answers to one question is right."""
    votes = [read_vote(answer["response"]) for answer in answers]
    keys = [None if vote is None else vote.key for vote in votes]
    right = [answer["rewards"].get("accuracy", 0.0) for answer in answers]
    scores = []
    for chosen in subsets(len(answers), size, seed=0):
        winner = majority_of([keys[index] for index in chosen])
        scores.append(0.0 if winner is None else right[chosen[winner]])
    return fmean(scores)


def judged(folder: str, samples: str) -> None:
    """reward@STEP: the reward model's mean opinion of the held-out answers after that step;
    win_rate@STEP: how often the judge prefers them to those of step 0, a tie being half."""
    by_step: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in read_lines(Path(samples)):
        if row["split"] == "eval":
            by_step[row["step"]][row["id"]].append(row)
    figures = {}
    for step, questions in sorted(by_step.items()):
        rewards = [fmean(row["rewards"]["accuracy"] for row in rows) for rows in questions.values()]
        figures[f"reward@{step}"] = _figure(rewards)
        wins = [_wins(rows, by_step[0][question]) for question, rows in questions.items()]
        figures[f"win_rate@{step}"] = _figure(wins)
    _write(folder, figures)


def _wins(answers: Sequence[Row], before: Sequence[Row]) -> float:
    pairs = zip(answers, before, strict=True)
    return fmean(prefer(new["question"], _summary(new), _summary(old)) for new, old in pairs)


def _summary(row: Row) -> str:
    return response_part(row["response"], "summary", opened=False).text or ""


def _figure(values: Sequence[float]) -> dict[str, float | None]:
    return estimate(values).as_json()


def _write(folder: str, figures: Mapping[str, Any]) -> None:
    atomic_write(Path(folder) / "figures.json", json.dumps(figures, indent=2) + "\n")
