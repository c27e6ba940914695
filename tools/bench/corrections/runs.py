"""The runs of the study: each a whole `megatron-r1 rl`, of which only its figures are kept.

All runs of a call are commands in this one process, by `commands.cli.main`. So the imports of vLLM
and of Megatron-Core are made once: engines and trainer ranks of every run are forked from the
processes that have made them (docs/startup.md), 25 CPU seconds less for each run but the first."""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import yaml

from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.commands import cli, rl
from megatron_r1.config import Config
from megatron_r1.controller.rollouts import step_sampler
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.controller.rollouts.step_sampler import StepSampler
from megatron_r1.pipeline.stages import merge_settings
from tools.bench import algorithms, host
from tools.bench.algorithms import LAPTOP
from tools.bench.corrections.cells import COMMON_SETTINGS, PARTS, TASKS, Part
from tools.bench.corrections.figures import Runs
from tools.bench.host import ROOT
from tools.bench.small_models import write_folder
from tools.evidence.records import head

MEANS = {
    "gap": "logprob_diff/mean",
    "masked": "engine_mask/tokens",
    "clipped": "clip_fraction",
    "truncated": "truncated",
}
"""Of each figure the metric whose mean over the steps it is; missing where a run has none."""


class Study:
    """The folder of a study: base models, and the figures of every finished run, a file each.

    Args:
        folder: what it is kept in."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.log = self.folder / "output.txt"

    def file(self, part: str, cell: str, seed: int) -> Path:
        """Return the file of a run's figures.

        Args:
            part: a name in `PARTS`.
            cell: one of its cells.
            seed: the run's seed."""
        return self.folder / "results" / part / cell / f"{seed}.json"

    def is_done(self, part: str, cell: str, seed: int) -> bool:
        """Return whether a run has been made.

        Args:
            part: a name in `PARTS`.
            cell: one of its cells.
            seed: the run's seed.

        Raises:
            SystemExit: it has, with other settings than it has now."""
        file = self.file(part, cell, seed)
        if not file.exists():
            return False
        if json.loads(file.read_text(encoding="utf-8"))["settings"] != cell_settings(part, cell):
            raise SystemExit(f"{file}: made with other settings; remove it, or give --folder")
        return True

    def take_over(self, runs: Runs) -> None:
        """Write the figures of runs made elsewhere, except of those that this folder has."""
        for part, cells in runs.items():
            for cell, seeds in cells.items():
                for seed, figures in seeds.items():
                    if not (file := self.file(part, cell, int(seed))).exists():
                        _write_figures(file, figures)

    def base(self, task: str) -> Path:
        """Return the folder of a task's base model, which is trained unless it is there."""
        run = self.folder / "base" / task
        if not (run / "hf").exists():
            if not (corpus := self.folder / "base.jsonl").exists():
                algorithms.write_corpus(self.folder, seed=0)
            if not (model := self.folder / "models" / task).exists():
                write_folder(model, TASKS[task].model)
            options = {"run.folder": run, "model.path": model, "sft.data": corpus}
            self._run_command("sft", LAPTOP / "base.yaml", options)
        return run / "hf"

    def make(self, part: str, cell: str, seed: int) -> float:
        """Make a run and write its figures; return its processor seconds.

        Args:
            part: a name in `PARTS`.
            cell: one of its cells.
            seed: the run's seed.

        Raises:
            SystemExit: a command fails, or is stopped."""
        settings = cell_settings(part, cell)
        model, run = self.base(PARTS[part].task), self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)  # of a call that was stopped
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings["recipe"], sort_keys=False), encoding="utf-8")
        options = {"run.folder": run, "run.seed": seed, "model.path": model}
        start = _core_seconds()
        with plant_fault(PARTS[part], cell):
            self._run_command("rl", recipe, options)
        seconds = _core_seconds() - start
        figures = run_figures(run, settings["recipe"]["rl"])
        figures = {"settings": settings, **provenance(), "core_seconds": seconds, **figures}
        _write_figures(self.file(part, cell, seed), figures)
        shutil.rmtree(run)
        return seconds

    def _run_command(self, verb: str, recipe: Path, options: Mapping[str, Any]) -> None:
        """Run a command of megatron-r1; its output is appended to the log.

        Raises:
            SystemExit: it fails, or is stopped."""
        words = [f"--{key}={value}" for key, value in options.items()]
        with self.log.open("a", encoding="utf-8") as log, contextlib.chdir(ROOT):
            print(verb, recipe, *words, file=log, flush=True)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                status = cli.main([verb, str(recipe), *words])
        if status:
            raise SystemExit(f"{verb} ended with {status}; {self.log} ends with the reason")


def _write_figures(file: Path, figures: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(figures, indent=1) + "\n")


def share_settings(runs: Runs) -> dict[str, Any]:
    """Return the runs as --json has them: under each cell the settings of its runs, once, and the
    figures by seed."""
    return {
        part: {
            cell: {
                "settings": next(iter(seeds.values()))["settings"],
                "seeds": {
                    seed: {key: value for key, value in run.items() if key != "settings"}
                    for seed, run in seeds.items()
                },
            }
            for cell, seeds in cells.items()
        }
        for part, cells in runs.items()
    }


def spread_settings(shared_runs: Mapping[str, Any]) -> Runs:
    """Return the runs of what `share_settings` returned, each with its cell's settings."""
    return {
        part: {
            name: {
                seed: {"settings": cell["settings"], **run} for seed, run in cell["seeds"].items()
            }
            for name, cell in cells.items()
        }
        for part, cells in shared_runs.items()
    }


def cell_settings(part: str, cell: str) -> dict[str, Any]:
    """Return all that a cell's runs have in common, as JSON: the recipe and what is planted.

    Args:
        part: a name in `PARTS`.
        cell: one of its cells."""
    study_part = PARTS[part]
    demo = yaml.safe_load((LAPTOP / "r1_zero.yaml").read_text(encoding="utf-8"))
    recipe = reduce(
        merge_settings, (demo, COMMON_SETTINGS, study_part.settings, study_part.cells[cell])
    )
    planted_temperature = study_part.engine_temperature
    settings = {
        "recipe": recipe,
        "task": study_part.task,
        "engine_temperature": planted_temperature,
    }
    return settings | ({"kept_ids": False} if cell == study_part.without_kept_ids else {})


@contextlib.contextmanager
def plant_fault(part: Part, cell: str) -> Iterator[None]:
    """Plant the fault of a part, or of one of its cells, in the runs of the block.

    What samples the rollouts is given another temperature than the trainer, or does not ask for the
    kept ids."""
    changes = {"temperature": part.engine_temperature}

    def sampler(config: Config, *arguments: Any) -> StepSampler:
        return StepSampler(config.with_changes(rollout=changes), *arguments)

    def without_kept_ids(**settings: Any) -> RolloutSampling:
        return RolloutSampling(**settings | {"sampling_mask": False})

    with contextlib.ExitStack() as patches:
        if part.engine_temperature is not None:
            patches.enter_context(patch.object(rl, "StepSampler", sampler))
        if cell == part.without_kept_ids:
            patches.enter_context(patch.object(step_sampler, "RolloutSampling", without_kept_ids))
        yield


def run_figures(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a finished run: those of `algorithms.run_figures`, and `MEANS`.

    Args:
        run: its folder.
        settings: its section rl."""
    metrics, evaluations = (
        list(read_lines(run / name)) for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    size = settings["prompts_per_rollout"], settings["group_size"]
    figures = algorithms.run_figures(metrics, evaluations, *size)
    for name, metric in MEANS.items():
        if values := [line[metric] for line in metrics if metric in line]:
            figures[name] = fmean(values)
    return figures


def provenance() -> dict[str, str]:
    """Return the date and, where git can tell, the commit."""
    return {"date": datetime.date.today().isoformat(), "commit": head(ROOT)}


def _core_seconds() -> float:
    return host.core_seconds(os.getpid(), with_ended=True)
