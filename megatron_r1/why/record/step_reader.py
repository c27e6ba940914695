"""Reads finished steps from their sample logs, with the questions and metrics of the run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from megatron_r1.why.record.examinable_steps import metric_lines_by_step
from megatron_r1.why.record.recorded_step import RecordedStep


class _Prompts(NamedTuple):
    """The questions of a run by id, why they are not all, and those to train on in order."""

    by_id: Mapping[str, Prompt]
    missing: str = ""
    training: Sequence[Prompt] = ()


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
    lines = metric_lines_by_step(folder)
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
