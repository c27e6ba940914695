"""The task of a run under faults, and the invariants of that run: each function yields its
violations, in words.

The task is the smallest one on which reinforcement learning visibly learns. A base model repeats a
number of three digits. It seldom thinks first, and is then right; mostly it guesses, with one
digit wrong. Reinforcement learning discovers that thinking pays; evaluation uses numbers it was
not trained on."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.base.files.json_lines import read_lines, write_lines
from tests.chaos.user import User
from tools.bench.host import megatron_r1, run_to_end
from tools.bench.small_models import qwen2, write_folder

HERE = Path(__file__).parent
THINKS = 0.2
"""Share of the base model's examples with a thought."""
RL_RECIPE = yaml.safe_load((HERE / "run.yaml").read_text())["rl"]
QUESTIONS, MINIBATCHES = RL_RECIPE["prompts_per_rollout"], RL_RECIPE["minibatches"]
NUMBERS = range(100, 1000)


def make_base(folder: Path, seed: int) -> Path:
    """Train a base model, in about a minute; return its folder."""
    model = write_folder(folder / "model", qwen2(64, 2, 2, max_position_embeddings=64))
    draw = random.Random(seed)
    write_lines(folder / "examples.jsonl", [_example(draw) for _ in range(64 * 400)])
    settings = {
        "run.folder": folder / "base",
        "run.seed": seed,
        "model.path": model,
        "sft.data": folder / "examples.jsonl",
    }
    run_to_end(megatron_r1("sft", HERE / "base.yaml", settings))
    return folder / "base" / "hf"


def command(
    base: Path, folder: Path, questions: Path, steps: int, seed: int, staleness: int
) -> list[str]:
    """Return the command of an RL run on `questions` that starts from the model `base`. staleness:
    `rl.staleness`; 0: the run is synchronous."""
    settings = {
        "run.folder": folder,
        "run.steps": steps,
        "run.seed": seed,
        "model.path": base,
        "data.path": questions,
    }
    if staleness:
        settings |= {"rl.staleness": staleness, "rl.importance_cap": 2.0}
    return megatron_r1("rl", HERE / "run.yaml", settings)


def write_questions(path: Path) -> Path:
    return write_lines(path, [{"question": f"{n}=", "truth": str(n)} for n in NUMBERS])


def _example(draw: random.Random) -> dict[str, str]:
    number = draw.choice(NUMBERS)
    thought, answer = "so", str(number)
    if draw.random() >= THINKS:
        thought, place = "", draw.randrange(3)
        wrong = draw.choice([d for d in "123456789" if d != answer[place]])
        answer = answer[:place] + wrong + answer[place + 1 :]
    response = f"<think>{thought}</think><answer>{answer}</answer>"
    return {"prompt": f"{number}=", "response": response}


NOT_OF_SAMPLES = (
    *("time/", "rewards/", "tokens_per_second", "groups/restored", "/restarts"),
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
        replayed = line["groups/restored"]
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
