"""Steps of a pretrained model compared with TRL's: questions, template and limits of
examples/smollm2, in fp32, and the most memory that all processes of a run hold together.

megatron-r1 runs with that recipe's `parallel.share_prompts` and settings of the engine."""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.smollm2.questions import write
from megatron_r1 import config as configuration
from megatron_r1.base.files.jsonl import read_lines, write_lines
from megatron_r1.base.processes.inspection import PeakMemory
from megatron_r1.config import Config
from tools.bench import machine
from tools.bench.children import ROOT
from tools.bench.step.figures import medians
from tools.bench.step.systems import run_ours, run_trl
from tools.bench.step.work import StepWork

RECIPE = ROOT / "examples/smollm2/rl.yaml"
SYSTEMS = ("ours", "trl")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return medians of each system, with every step they come from."""
    steps: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    peaks: dict[str, list[float]] = {system: [] for system in steps}
    loads, worth = [], []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(chosen.model).absolute()
        work, questions, settings = given(chosen, folder)
        for turn, system in enumerate([*steps] * chosen.repeats):
            loads.append(os.getloadavg()[0])
            worth.append(machine.cores_worth())
            with PeakMemory(every_seconds=1.0) as peak:
                inputs = work, model, questions
                if system == "trl":
                    lines = run_trl(*inputs, chosen.steps, chosen.peer_python)
                else:
                    lines = run_ours(*inputs, folder / f"{turn}", chosen.steps, settings)
            steps[system] += lines
            peaks[system].append(peak.gib)
            seconds = ", ".join(f"{line['seconds']:.1f}" for line in lines)
            print(f"{system}: {seconds} s a step, {peak.gib:.1f} GiB", flush=True)
    found = {name: medians(lines) | {"gib": max(peaks[name])} for name, lines in steps.items()}
    for name, of in found.items():
        rate = of["tokens_per_second"]
        ratio = rate / found["trl"]["tokens_per_second"]
        print(
            f"{name:20}{of['seconds']:8.2f} s/step{of['core_seconds']:8.2f} core s"
            f"{of['response_tokens']:8,.0f} tokens{rate:8.1f} tokens/s"
            f"{of['gib']:7.1f} GiB{ratio:7.2f}"
        )
    return {
        "loads": loads,
        "cores are worth": worth,
        "work": vars(work),
        "medians": found,
        "peaks": peaks,
        "steps": steps,
    }


def given(chosen: argparse.Namespace, folder: Path) -> tuple[StepWork, Path, dict[str, dict]]:
    """Return the work, the file of its questions, below `folder`, and our settings."""
    recipe = configuration.load(RECIPE)
    options = {"limit": chosen.limit, "questions": chosen.questions}
    work = replace(
        work_of(recipe),
        peer_microbatch=chosen.peer_microbatch,
        **{key: value for key, value in options.items() if value},
    )
    return work, write_prompts(folder, recipe.data.template), faster(recipe)


def work_of(recipe: Config) -> StepWork:
    """Return the recipe's part of the work that both systems share."""
    return StepWork(
        limit=recipe.rollout.max_response_tokens,
        questions=recipe.rl.questions_per_rollout,
        group=recipe.rl.group_size,
        minibatches=recipe.rl.minibatches,
        kl_beta=recipe.rl.kl_beta,
    )


def faster(recipe: Config) -> dict[str, dict[str, Any]]:
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
            "question": template.replace("{problem}", row["question"]),
            "truth": row["truth"],
            "kind": "tools.bench.step.work:grade",
        }
        for row in read_lines(folder / "train.jsonl")
    ]
    return write_lines(folder / "prompts.jsonl", rows)
