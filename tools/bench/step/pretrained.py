"""Steps of a pretrained model in both systems, with the questions, template and limits of
examples/smollm2, in fp32.

megatron-r1 runs the model with that recipe's `parallel.share_prompts` and settings of the
engine."""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.smollm2.questions import write
from megatron_r1 import config as configuration
from megatron_r1.base.files.json_lines import read_lines, write_lines
from megatron_r1.base.processes.host_memory import PeakMemory
from megatron_r1.config import Config
from tools.bench import host
from tools.bench.host import ROOT
from tools.bench.step.figures import medians
from tools.bench.step.systems import run_ours, run_trl
from tools.bench.step.work import StepWork

PRETRAINED_RECIPE = ROOT / "examples/smollm2/rl.yaml"
SYSTEMS = ("ours", "trl")


def run_pretrained(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians of each system, with every step they come from."""
    steps: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    peaks: dict[str, list[float]] = {system: [] for system in steps}
    loads, worth = [], []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(args.model).absolute()
        work, questions, settings = pretrained_settings(args, folder)
        for turn, system in enumerate([*steps] * args.repeats):
            loads.append(os.getloadavg()[0])
            worth.append(host.cores_worth())
            with PeakMemory(every_seconds=1.0) as peak:
                inputs = work, model, questions
                if system == "trl":
                    lines = run_trl(*inputs, args.steps, args.peer_python)
                else:
                    lines = run_ours(*inputs, folder / f"{turn}", args.steps, settings)
            steps[system] += lines
            peaks[system].append(peak.gib)
            seconds = ", ".join(f"{line['seconds']:.1f}" for line in lines)
            print(f"{system}: {seconds} s a step, {peak.gib:.1f} GiB", flush=True)
    system_medians = {
        name: medians(lines) | {"gib": max(peaks[name])} for name, lines in steps.items()
    }
    for name, figures in system_medians.items():
        rate = figures["tokens_per_second"]
        ratio = rate / system_medians["trl"]["tokens_per_second"]
        print(
            f"{name:20}{figures['seconds']:8.2f} s/step{figures['core_seconds']:8.2f} core s"
            f"{figures['response_tokens']:8,.0f} tokens{rate:8.1f} tokens/s"
            f"{figures['gib']:7.1f} GiB{ratio:7.2f}"
        )
    return {
        "loads": loads,
        "cores are worth": worth,
        "work": vars(work),
        "medians": system_medians,
        "peaks": peaks,
        "steps": steps,
    }


def pretrained_settings(
    args: argparse.Namespace, folder: Path
) -> tuple[StepWork, Path, dict[str, dict[str, Any]]]:
    """Return the work, the file of its questions, below `folder`, and our settings."""
    recipe = configuration.load_recipe(PRETRAINED_RECIPE)
    options = {"limit": args.limit, "questions": args.questions}
    work = replace(
        pretrained_work(recipe),
        peer_microbatch=args.peer_microbatch,
        **{key: value for key, value in options.items() if value},
    )
    return work, write_prompts(folder, recipe.data.template), speed_settings_of(recipe)


def pretrained_work(recipe: Config) -> StepWork:
    """Return the recipe's part of the work that both systems share."""
    return StepWork(
        limit=recipe.rollout.max_response_tokens,
        questions=recipe.rl.prompts_per_rollout,
        group=recipe.rl.group_size,
        minibatches=recipe.rl.minibatches,
        kl_beta=recipe.rl.kl_beta,
    )


def speed_settings_of(recipe: Config) -> dict[str, dict[str, Any]]:
    """Return the recipe's settings that change only how fast a step is."""
    engine = {"threads", "kv_block_tokens"}
    return {
        "parallel": {"share_prompts": recipe.parallel.share_prompts},
        "rollout": recipe.rollout.model_dump(include=engine),
    }


def write_prompts(folder: Path, template: str) -> Path:
    """Write the training questions in `template`, which TRL does not know, as work's questions."""
    write(str(folder))
    rows = [
        {
            "question": template.replace("{question}", row["question"]),
            "truth": row["truth"],
            "kind": "tools.bench.step.work:grade",
        }
        for row in read_lines(folder / "train.jsonl")
    ]
    return write_lines(folder / "prompts.jsonl", rows)
