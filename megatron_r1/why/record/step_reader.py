"""Finds the finished steps of a run's folder that have a sample log, and reads them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.config import Config
from megatron_r1.config.schedule import digest_until
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.controller.rollouts.sample_log import (
    GroupRecord,
    decode,
    from_record,
    step_log_path,
)
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompts import load_prompts, prompt_options
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints.checkpoint_folders import SHOWN_FAULTS
from megatron_r1.trainer.checkpoints.manifest import manifest_faults
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after


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


class _Prompts(NamedTuple):
    """The questions of a run by id, why they are not all, and those to train on in order."""

    by_id: Mapping[str, Prompt]
    missing: str = ""
    training: Sequence[Prompt] = ()


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
    for step in sorted(_lines_by_step(folder)):
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


def _lines_by_step(folder: RunFolder) -> dict[int, dict[str, Any]]:
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


def read_step(folder: RunFolder, config: Config, step: int) -> RecordedStep:
    """Read a step.

    Args:
        folder: the run's folder.
        config: the run's settings.
        step: a finished step with a sample log.

    Raises:
        UserError: records of another version of this program, or none of the step's settings."""
    return next(read_steps(folder, config, [step]))


def read_steps(folder: RunFolder, config: Config, steps: Iterable[int]) -> Iterator[RecordedStep]:
    """Yield steps; questions and metrics are read once for all of them.

    Args:
        folder: the run's folder.
        config: the run's settings.
        steps: finished steps with a sample log.

    Raises:
        UserError: records of another version of this program, or none of a step's settings."""
    prompts = _load_run_prompts(folder, config)
    lines = _lines_by_step(folder)
    for step in steps:
        yield _read_step_log(folder, config, lines[step], prompts)


def _read_step_log(
    folder: RunFolder,
    config: Config,
    line: Mapping[str, Any],
    prompts: _Prompts,
) -> RecordedStep:
    step = line["step"]
    path = step_log_path(folder.sample_log, step)
    schedule = digest_until(config.rl.schedule, step)
    records: dict[int, GroupRecord] = {}
    file = FramedFile.read(path, repair=False)
    for payload in file:
        record = decode(payload)
        if isinstance(record, GroupRecord) and record.schedule == schedule:
            records[record.prompt_index] = record
    if not records:
        raise UserError(
            f"{path}: no group of these settings is in it; it is damaged, or of another run",
            key="--step",
            cause=Cause.EMPTY,
        )
    ordered = [records[position] for position in sorted(records)]
    groups = [
        from_record(
            record, prompts.by_id.get(record.prompt_id) or Prompt(record.prompt_id, "", "", None)
        )
        for record in ordered
    ]
    sampling = {id(group): record.sampling for group, record in zip(groups, ordered, strict=True)}
    at_step = config.at(step)
    expected = max(at_step.rl.prompts_per_rollout, max(records) + 1)
    filtered_groups: list[Group] = []
    if at_step.rl.dynamic_sampling:
        groups, filtered_groups = _trained_on(groups, at_step.rl.prompts_per_rollout)
    return RecordedStep(
        folder,
        config,
        step,
        line,
        groups,
        filtered_groups,
        [sampling[id(group)] for group in groups + filtered_groups],
        prompts.by_id,
        prompts.missing,
        prompts.training,
        # A kill leaves bytes of a group that is logged again.
        file.num_damaged_bytes if len(records) < expected else 0,
    )


def _trained_on(groups: list[Group], count: int) -> tuple[list[Group], list[Group]]:
    """Return groups as dynamic sampling chooses them: those with different rewards first, then
    others up to the count; and the rest."""
    different = [group for group in groups if not group.has_equal_rewards]
    equal = [group for group in groups if group.has_equal_rewards]
    missing = max(0, count - len(different))
    return different + equal[:missing], equal[missing:]


def _load_run_prompts(folder: RunFolder, config: Config) -> _Prompts:
    """Return the questions of the run; where the data is not here, those of samples.jsonl."""
    data = config.data
    try:
        split = load_prompts(**prompt_options(data))
    except UserError as error:
        lines = (line for line in read_lines(folder.samples_path) if line.get("split") == "train")
        known_prompts = {
            line["id"]: Prompt(line["id"], line["question"], data.kind or "", line["truth"])
            for line in lines
            if "id" in line
        }
        return _Prompts(known_prompts, f"the questions could not be read: {error}")
    by_id = {prompt.id: prompt for prompt in [*split.train, *split.heldout]}
    return _Prompts(by_id, training=split.train)
