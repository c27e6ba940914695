"""Figures that no stage writes itself: accuracy during training, majority votes, win rates."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from examples.laptop.r1.measure import Row, figure, win_rate, write_figures
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.evaluation.estimates import index_subsets
from megatron_r1.evaluation.voting import can_vote, majority_index, read_vote


def learning(folder: str, **runs: str) -> None:
    """Write NAME: mean accuracy over all steps of a run, given its metrics.jsonl.

    If all runs end at the same accuracy, it shows which reached it sooner."""
    means = {
        name: fmean(line["accuracy"] for line in read_lines(Path(metrics)))
        for name, metrics in runs.items()
    }
    write_figures(folder, {name: {"value": mean} for name, mean in means.items()})


def votes(folder: str, samples: str, sizes: list[int]) -> None:
    """Write majority@N: share of questions whose majority of N answers is right.

    It is the mean over sets of N of a question's answers, for questions with comparable answers."""
    rows = sorted(read_lines(Path(samples)), key=lambda row: (row["id"], row["index"]))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["id"])]
    groups = [group for group in groups if can_vote(group[0]["kind"])]
    figures = {
        f"majority@{n}": figure([majority_accuracy(group, n) for group in groups]) for n in sizes
    }
    write_figures(folder, figures)


def majority_accuracy(answers: Sequence[Row], size: int) -> float:
    """Return how often the majority of `size` of these answers to one question is right."""
    votes = [read_vote(answer["response"]) for answer in answers]
    keys = [None if vote is None else vote.key for vote in votes]
    rewards = [answer["rewards"].get("accuracy", 0.0) for answer in answers]
    scores = []
    for chosen in index_subsets(len(answers), size, seed=0):
        winner = majority_index([keys[index] for index in chosen])
        scores.append(0.0 if winner is None else rewards[chosen[winner]])
    return fmean(scores)


def judged(folder: str, samples: str) -> None:
    """Write reward@STEP, the reward model's mean score of the held-out responses after that step,
    and win_rate@STEP, their rate of wins by the judge against those of step 0."""
    by_step: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in read_lines(Path(samples)):
        if row["split"] == "eval":
            by_step[row["step"]][row["id"]].append(row)
    figures = {}
    for step, questions in sorted(by_step.items()):
        rewards = [fmean(row["rewards"]["accuracy"] for row in rows) for rows in questions.values()]
        figures[f"reward@{step}"] = figure(rewards)
        wins = [win_rate(rows, by_step[0][question]) for question, rows in questions.items()]
        figures[f"win_rate@{step}"] = figure(wins)
    write_figures(folder, figures)
