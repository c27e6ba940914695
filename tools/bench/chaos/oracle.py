"""The invariants of a run under faults: each function yields its violations, in words."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.base.files.jsonl import read_lines
from tools.bench.chaos.task import MINIBATCHES, QUESTIONS
from tools.bench.chaos.user import User

NOT_OF_SAMPLES = (
    *("time/", "rewards/", "tokens_per_second", "groups/replayed", "/restarts"),
    *("engines/", "checkpoint/", "push/"),
)
"""Parts of the names of metrics that differ when a step is repeated with the same samples."""
AGREEMENT = 1e-4
"""Trainer's and engine's log-probabilities in fp32 differ by 1e-6 to 1e-5; a token of weights that
are not those it is stamped with, by more."""
MOST_FROM_MEAN = 1.96 * 2**0.5
"""Standard errors that separate two measurements of the same accuracy in 5% of cases."""
LEAST_SPREAD = 0.05
"""The spread of undisturbed runs of this task, which differ only in what was sampled."""


def steps_once(run: Path, steps: int, staleness: int = 0) -> Iterator[str]:
    """Check metrics.jsonl: every step once, in order, after the right number of updates.

    Samples must be at most `staleness` policy versions old; without staleness, the trainer's and
    the engine's log-probabilities must agree."""
    metrics = list(read_lines(run / "metrics.jsonl"))
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
    """Check samples.jsonl: every step has the undisturbed run's questions, once each."""
    asked, expected = _questions(run), _questions(undisturbed)
    for step in range(1, steps + 1):
        if asked[step] != expected[step]:
            yield f"step {step}: trained on {asked[step]}, undisturbed on {expected[step]}"
        if len(asked[step]) != QUESTIONS:
            yield f"step {step}: {len(asked[step])} groups of {QUESTIONS}"


def _questions(run: Path) -> dict[int, list[str]]:
    by_step: dict[int, list[str]] = {}
    for sample in read_lines(run / "samples.jsonl"):
        if sample["split"] == "train":
            by_step.setdefault(sample["step"], []).append(sample["id"])
    return by_step


def evaluated_once(run: Path, undisturbed: Path) -> Iterator[str]:
    """Check evaluations.jsonl: the steps of the undisturbed run, once each."""
    evaluations = (read_lines(folder / "evaluations.jsonl") for folder in (run, undisturbed))
    found, expected = ([line["step"] for line in lines] for lines in evaluations)
    if found != expected:
        yield f"evaluated at steps {found}, undisturbed at {expected}"


def nothing_lost(user: User) -> Iterator[str]:
    """Check that repeated steps reuse their samples, and that finished groups are never dropped.

    All that follows from the samples is bit-identical in a repeated step. The next command trains
    on every finished group of a batch that was incomplete when a command ended."""
    first: dict[int, dict[str, Any]] = {}
    for sighting in user.sightings:
        line, step = sighting.line, sighting.line["step"]
        replayed = line["groups/replayed"]
        if sighting.start:
            kept = user.ends[sighting.start - 1].kept.get(step, 0)
            if replayed < kept:
                yield f"step {step}: {kept} groups were finished, {replayed} of them were used"
        if step in first:
            if replayed != QUESTIONS:
                yield f"step {step}, done again: {QUESTIONS - replayed} groups were sampled again"
            keys = [key for key in first[step] | line if first[step].get(key) != line.get(key)]
            keys = [key for key in keys if not any(word in key for word in NOT_OF_SAMPLES)]
            if keys:
                yield f"step {step}, done again, differs in {', '.join(keys)}"
        first.setdefault(step, line)


def as_accurate(run: Path, undisturbed: list[Path]) -> Iterator[str]:
    """Check held-out accuracy at the end: within `allowed_gap` of the undisturbed runs' mean.

    Engines batch requests in order of arrival, so runs of one recipe draw different samples and end
    at accuracies that are near each other but not equal."""
    own, (mean, allowed) = accuracy(run), allowed_gap(undisturbed)
    if abs(own - mean) > allowed:
        yield f"accuracy {own:.3f}; undisturbed {mean:.3f}, at most {allowed:.3f} from it"


def allowed_gap(undisturbed: list[Path]) -> tuple[float, float]:
    """Return the runs' mean final accuracy and the difference from it that is allowed: the larger
    of their spread and the sampling noise of a difference of two evaluations."""
    ends = [_last_evaluation(run) for run in undisturbed]
    found = [end["eval/pass@1"] for end in ends]
    errors = [(e["interval/pass@1/high"] - e["interval/pass@1/low"]) / 2 / 1.96 for e in ends]
    noise = MOST_FROM_MEAN * max(errors)
    return sum(found) / len(found), max(max(found) - min(found), noise, LEAST_SPREAD)


def accuracy(run: Path) -> float:
    return _last_evaluation(run)["eval/pass@1"]


def _last_evaluation(run: Path) -> dict[str, Any]:
    return list(read_lines(run / "evaluations.jsonl"))[-1]
