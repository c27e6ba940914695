"""What must hold of a run, whatever was done to it: each a function that returns what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .task import MINIBATCHES, QUESTIONS
from .user import User

NOT_OF_THE_SAMPLES = ("time/", "rewards/", "tokens_per_second", "groups/replayed", "/restarts")
NOT_OF_THE_SAMPLES += ("engines/", "checkpoint/", "push/")
"""Parts of the names of what a step that is done again measures anew."""
AGREEMENT = 1e-4
"""Trainer's and engine's log-probabilities in fp32 differ by 1e-6 to 1e-5; a token of weights that
are not those it is stamped with, by more."""
MOST_FROM_MEAN = 1.96 * 2**0.5
"""Standard errors that separate two measurements of the same accuracy in 5% of cases."""
LEAST_SPREAD = 0.05
"""Between undisturbed runs of this task that differ in nothing but what was sampled."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_once(run: Path, steps: int, staleness: int = 0) -> Iterator[str]:
    """metrics.jsonl: every step, in order, after so many updates, of samples of one policy, or of
    policies at most `staleness` versions older. Where they are of one, log-probabilities agree."""
    metrics = lines(run / "metrics.jsonl")
    found = [line["step"] for line in metrics]
    if found != list(range(1, steps + 1)):
        counts = Counter(found)
        twice = [step for step, count in counts.items() if count > 1]
        missing = [step for step in range(1, steps + 1) if step not in counts]
        yield f"metrics.jsonl: twice {twice}, missing {missing}, in order: {found == sorted(found)}"
    for line in metrics:
        step = line["step"]
        if line["optimizer_step"] != MINIBATCHES * step:
            yield f"step {step}: after {line['optimizer_step']} updates"
        if not 0 <= line["staleness"] <= staleness or line["policy_version"] != step - 1:
            yield f"step {step}: its samples are of another policy, {line['staleness']} older"
        if line["staleness"] == 0 and not line["logprob_diff/max"] < AGREEMENT:
            yield f"step {step}: trainer and engine differ by {line['logprob_diff/max']:.3g}"


def samples_once(run: Path, undisturbed: Path, steps: int) -> Iterator[str]:
    """samples.jsonl: the questions of every step are those of the undisturbed run, once each."""
    asked, expected = _questions(run), _questions(undisturbed)
    for step in range(1, steps + 1):
        if asked[step] != expected[step]:
            yield f"step {step}: trained on {asked[step]}, undisturbed on {expected[step]}"
        if len(asked[step]) != QUESTIONS:
            yield f"step {step}: {len(asked[step])} groups of {QUESTIONS}"


def _questions(run: Path) -> dict[int, list[str]]:
    by_step: dict[int, list[str]] = {}
    for sample in lines(run / "samples.jsonl"):
        if sample["split"] == "train":
            by_step.setdefault(sample["step"], []).append(sample["id"])
    return by_step


def evaluated_once(run: Path, undisturbed: Path) -> Iterator[str]:
    """evaluations.jsonl: those of the undisturbed run, once each."""
    found, expected = (
        [line["step"] for line in lines(folder / "evaluations.jsonl")]
        for folder in (run, undisturbed)
    )
    if found != expected:
        yield f"evaluated at steps {found}, undisturbed at {expected}"


def nothing_lost(user: User) -> Iterator[str]:
    """A step that is done again is trained on the samples it had, which are not made again: all
    that follows from them is the same to the last bit. And of a batch that was not finished when
    the command ended, the next command trains on every group that was."""
    first: dict[int, dict[str, Any]] = {}
    for sighting in user.sightings:
        line = sighting.line
        step, replayed = line["step"], line["groups/replayed"]
        if sighting.start:
            kept = user.ends[sighting.start - 1].kept.get(step, 0)
            if replayed < kept:
                yield f"step {step}: {kept} groups were finished, {replayed} of them were used"
        if step in first:
            if replayed != QUESTIONS:
                yield f"step {step}, done again: {QUESTIONS - replayed} groups were sampled again"
            before, now = of_the_samples(first[step]), of_the_samples(line)
            if now != before:
                keys = [key for key in now if now[key] != before.get(key)]
                yield f"step {step}, done again, differs in {', '.join(keys)}"
        first.setdefault(step, line)


def of_the_samples(line: dict[str, Any]) -> dict[str, Any]:
    """What of a metrics line follows from samples and weights alone."""
    return {k: v for k, v in line.items() if not any(word in k for word in NOT_OF_THE_SAMPLES)}


def as_accurate(run: Path, undisturbed: list[Path]) -> Iterator[str]:
    """Held-out accuracy at the end. Runs of one recipe draw other samples each time, as engines do
    what comes in whichever order it comes, so they end at accuracies that are near each other and
    not equal: the disturbed one may differ from their mean by `allowed_gap`."""
    own = accuracy(run)
    mean, allowed = allowed_gap(undisturbed)
    if abs(own - mean) > allowed:
        yield f"accuracy {own:.3f}; undisturbed {mean:.3f}, at most {allowed:.3f} from it"


def allowed_gap(undisturbed: list[Path]) -> tuple[float, float]:
    """Mean accuracy at the end, and by how much a run may differ from it: the larger of their
    spread and the sampling noise of a difference of two evaluations."""
    ends = [lines(run / "evaluations.jsonl")[-1] for run in undisturbed]
    found = [end["eval/pass@1"] for end in ends]
    errors = [(e["interval/pass@1/high"] - e["interval/pass@1/low"]) / 2 / 1.96 for e in ends]
    noise = MOST_FROM_MEAN * max(errors)
    return sum(found) / len(found), max(max(found) - min(found), noise, LEAST_SPREAD)


def accuracy(run: Path) -> float:
    return lines(run / "evaluations.jsonl")[-1]["eval/pass@1"]


def all_wrong(
    user: User, run: Path, undisturbed: list[Path], steps: int, staleness: int
) -> list[str]:
    """Everything that does not hold."""
    return [
        *steps_once(run, steps, staleness),
        *samples_once(run, undisturbed[0], steps),
        *evaluated_once(run, undisturbed[0]),
        *nothing_lost(user),
        *as_accurate(run, undisturbed),
    ]
