"""Published runs, from published.yaml, and what the plan predicts of each."""

import argparse
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.flops import forward_flops
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.recipe_job import load_planned_recipe, planned_job
from megatron_r1.plan.step_time import StepTime
from megatron_r1.plan.timing import time_section

RUNS_FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class SchedulePart:
    """Steps of a run with the same settings.

    Attributes:
        steps: how many.
        job: their job.
        trainer_bytes: the trainer's, on an engine's GPU."""

    steps: int
    job: PlannedJob
    trainer_bytes: int

    def times(self, values: dict[str, float]) -> StepTime:
        """Return the times with `values` in place of assumed numbers."""
        changes: dict[str, Any] = values
        job = replace(self.job, assumptions=replace(self.job.assumptions, **changes))
        return StepTime(job, EngineMemory(job, self.trainer_bytes))


@dataclass(frozen=True)
class PublishedRun:
    """A published figure.

    Attributes:
        name: the run.
        system: whose it is.
        is_for_calibration: whether it is in the half that calibrates.
        options: options of megatron-r1 plan that describe it.
        number: "run" (hours), "MFU" (a share), or a line of the estimate's section "time" (s).
        published_value: the figure.
        plain_megatron: whether its trainer is plain Megatron-Core (`PlannedJob`)."""

    name: str
    system: str
    is_for_calibration: bool
    options: str
    number: str
    published_value: float
    plain_megatron: bool = False

    @property
    def unit(self) -> str:
        """The unit of the published number: hours, share or s."""
        return {"run": "hours", "MFU": "share"}.get(self.number, "s")

    @property
    def recipe(self) -> Path:
        """The file of the recipe that stands for the published run, the first of its options."""
        return Path(shlex.split(self.options)[0])

    @cached_property
    def schedule_parts(self) -> list[SchedulePart]:
        """Return the parts of the recipe's schedule with the run's options."""
        args, overrides = parse_job_arguments(shlex.split(self.options))
        parts = planned_parts(self.recipe, args, overrides, with_all_parts=self.number == "run")
        return [
            replace(part, job=replace(part.job, plain_megatron=self.plain_megatron))
            for part in parts
        ]

    def predict(self, **values: float) -> float:
        """Return the plan's figure, with `values` in place of assumed numbers."""
        if self.number == "run":
            parts = ((p.steps, p.times(values)) for p in self.schedule_parts)
            return sum(n * time_section(times)["step"].number for n, times in parts) / 3600
        times = self.schedule_parts[0].times(values)
        if self.number == "MFU":
            return _flops_utilization(times)
        return time_section(times)[self.number].number

    def ratio(self, **values: float) -> float:
        """Return predicted over published time."""
        ratio = self.predict(**values) / self.published_value
        return 1 / ratio if self.number == "MFU" else ratio


def _flops_utilization(times: StepTime) -> float:
    """Return an optimizer step's operations, without recomputed ones, over those of the peak."""
    job = times.job
    flops = (
        3
        * forward_flops(job.hf_config, job.mean_sample_tokens)
        * job.update_samples
        * job.mean_sample_tokens
    )
    return flops / (times.optimizer_step_seconds() * job.world_size * job.hardware.bf16)


def planned_parts(
    recipe: Path,
    args: argparse.Namespace,
    overrides: dict[str, Any],
    *,
    with_all_parts: bool = True,
) -> list[SchedulePart]:
    """Return the parts of `rl.schedule`, or the first alone.

    Args:
        recipe: the recipe's file.
        args: the options of the command line.
        overrides: dotted settings in place of the recipe's.
        with_all_parts: whether all parts are returned."""
    config = load_planned_recipe(recipe, overrides)
    starts = [step for step, _ in config.schedule_parts()] if with_all_parts else [1]
    ends = [*starts[1:], config.run.steps + 1]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        estimate = JobEstimate(planned_job(recipe, args, overrides, start))
        trainer_bytes = estimate.engines.trainer_bytes if estimate.job.generates else 0
        parts.append(SchedulePart(end - start, estimate.job, trainer_bytes))
    return parts


def published_runs() -> list[PublishedRun]:
    """Return the rows of published.yaml. In each source every other row, from the first on, is of
    the half that calibrates."""
    text = yaml.safe_load(RUNS_FILE.read_text(encoding="utf-8"))
    return [
        PublishedRun(
            name=row["name"],
            system=source["name"],
            is_for_calibration=index % 2 == 0,
            options=f"{text['bases'][row['base']]} {row.get('options', '')}",
            number=row.get("number", "step"),
            published_value=row["published"],
            plain_megatron=source.get("plain_megatron", False),
        )
        for source in text["sources"]
        for index, row in enumerate(source["rows"])
    ]
