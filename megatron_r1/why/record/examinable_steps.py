"""Opens the folder of an RL run, and finds its finished steps that have a sample log."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.sample_log import step_log_path
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints.checkpoint_folders import SHOWN_FAULTS
from megatron_r1.trainer.checkpoints.manifest import manifest_faults
from megatron_r1.why.record.recorded_step import weights_after


class ExaminableStep(NamedTuple):
    """A step with a sample log, and what else of it is left.

    Attributes:
        has_before: whether the weights before it are there, with files of the right sizes.
        has_after: likewise of the weights after it.
        damage: what is wrong with its own checkpoint; "" where nothing is or there is none."""

    step: int
    has_before: bool
    has_after: bool
    damage: str = ""


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """Return a run's folder and settings.

    Raises:
        UserError: a folder without an RL run.
    """
    folder = RunFolder(path)
    if not folder.config_path.is_file():
        raise UserError(
            f"{path}: no config.yaml is here; give the folder of a run",
            key="RUN",
            cause=Cause.NOT_FOUND,
        )
    config = configuration.load_recipe(str(folder.config_path))
    if configuration.infer_verb(config) != "rl" and not folder.sample_log.is_dir():
        raise UserError(
            f"{path}: this run has no rollouts; give the folder of an rl run",
            key="RUN",
            cause=Cause.UNSUPPORTED,
        )
    return folder, config


def examinable_steps(folder: RunFolder, config: Config) -> list[ExaminableStep]:
    """Return the finished steps that have a sample log."""
    damage = cache(partial(_describe_damage, folder))
    steps = []
    for step in sorted(metric_lines_by_step(folder)):
        if step_log_path(folder.sample_log, step).is_file():
            before, after = (weights_after(folder, config, version) for version in (step - 1, step))
            has_before, has_after = (
                path is not None and not damage(path) for path in (before, after)
            )
            steps.append(ExaminableStep(step, has_before, has_after, damage(after)))
    return steps


def _describe_damage(folder: RunFolder, path: Path | None) -> str:
    """Return what the names and sizes of a checkpoint's files say is wrong with it; "" for a folder
    that is not the run's own."""
    if path is None or path.parent != folder.checkpoints:
        return ""
    return "; ".join(manifest_faults(path, "size")[:SHOWN_FAULTS])


def metric_lines_by_step(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """Return the lines of metrics.jsonl by step."""
    return {line["step"]: line for line in folder.read_metrics()}


def choose_step(steps: Sequence[ExaminableStep], step: int | None, folder: Path) -> ExaminableStep:
    """Return the step to examine: the wanted one, or the newest with most left of it.

    Args:
        steps: those with a sample log.
        step: its number, or None.
        folder: the run's folder, for errors.

    Raises:
        UserError: the step has no sample log, or none has one."""
    if not steps:
        raise UserError(
            f"{folder}: no finished step has a sample log, which why recomputes; start the run "
            "with --rl.keep_sample_log true --checkpoint.keep_every 1",
            key="RUN",
            cause=Cause.EMPTY,
        )
    if step is None:
        return max(
            steps,
            key=lambda examinable_step: (
                examinable_step.has_before + examinable_step.has_after,
                examinable_step.step,
            ),
        )
    chosen_step = next(
        (examinable_step for examinable_step in steps if examinable_step.step == step), None
    )
    if chosen_step is None:
        logged_steps = ", ".join(str(examinable_step.step) for examinable_step in steps)
        raise UserError(
            f"--step {step}: {folder} has no sample log of that step; it has those of "
            f"{logged_steps}",
            key="--step",
            cause=Cause.NOT_FOUND,
        )
    return chosen_step
