"""Compares the questions of a step with those that the run's seed draws for it."""

import json
from collections.abc import Sequence

from megatron_r1.data.sampler import PromptSampler
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE
from megatron_r1.why.comparison import DEPARTS, Comparison, fraction_comparison, not_checked
from megatron_r1.why.formulas import question_order
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "files"
NAME = "questions of the step"


def compare_questions(step: RecordedStep) -> list[Comparison]:
    """Return the comparison of a step's questions, after that of a damaged sample log."""
    if step.num_damaged_bytes:
        num_groups = len(step.groups) + len(step.filtered_groups)
        return [
            Comparison(
                FAMILY,
                "sample log",
                DEPARTS,
                "its records with their checksums",
                step.num_damaged_bytes,
                0,
                "exact",
                f"{step.num_damaged_bytes:,} bytes of step {step.step} are no whole record, and "
                f"only {num_groups:,} groups are: what follows is of a part of the step",
                remedy="sample_log/: the file was damaged; examine another step",
            ),
            not_checked(FAMILY, NAME, "groups are missing in the sample log"),
        ]
    question_ids = [group.prompt.id for group in step.groups]
    due_ids = _due_questions(step, step.step)
    is_one = len(set(question_ids)) == 1 < min(len(question_ids), len(step.training_prompts))
    if due_ids is None and not is_one:
        return [not_checked(FAMILY, NAME, _unknown_order(step))]
    wrong_groups = [
        number
        for number, question in enumerate(question_ids)
        if (number > 0 if due_ids is None else question not in due_ids[number : number + 1])
    ]
    departing_responses = [
        (number, index)
        for number in wrong_groups
        for index in range(len(step.groups[number].responses))
    ]
    reason = (
        f"{len(wrong_groups):,} of {len(question_ids):,} groups are of other questions than are due"
    )
    if is_one:
        reason = f"all {len(question_ids):,} groups are of one question, {question_ids[0]}"
    elif (earlier_step := _step_of(step, question_ids)) is not None:
        reason = f"the questions are those of step {earlier_step} once more"
    elif due_ids is not None and sorted(question_ids) == sorted(due_ids):
        reason = f"the questions are those of the step in another order: {reason}"
    return [
        fraction_comparison(
            FAMILY,
            NAME,
            f"those of {len(question_ids):,} groups with the order of run.seed",
            departing_responses,
            len(step.responses),
            reason=reason,
            remedy="what draws the questions (data/sampler.py): each step continues where the one "
            "before ended",
            loss_fraction=step.loss_fraction,
        )
    ]


def _due_questions(step: RecordedStep, number: int) -> list[str] | None:
    """Return the ids of a step's questions by the settings; None where they do not say."""
    settings = [step.run_config.at(earlier_step).rl for earlier_step in range(1, number + 1)]
    if any(rl.dynamic_sampling or rl.kind_weights for rl in settings) or not _is_known(step):
        return None
    *before, count = (rl.prompts_per_rollout for rl in settings)
    order = question_order(len(step.training_prompts), step.run_config.run.seed, sum(before), count)
    return [step.training_prompts[index].id for index in order]


def _step_of(step: RecordedStep, question_ids: Sequence[str]) -> int | None:
    """Return the step before that had the questions; None where none had."""
    earlier_steps = range(step.step - 1, 0, -1)
    return next(
        (number for number in earlier_steps if _due_questions(step, number) == question_ids), None
    )


def _is_known(step: RecordedStep) -> bool:
    """Return whether a checkpoint says that the run drew from the questions that were read here: it
    leaves out those that are too long."""
    if not step.training_prompts:
        return False
    for checkpoint in (step.checkpoint_before, step.checkpoint_after):
        if checkpoint is not None and (checkpoint / STATE_FILE).is_file():
            try:
                state = json.loads((checkpoint / STATE_FILE).read_bytes())["sampler"]
            except (ValueError, KeyError):
                return False
            sampler = PromptSampler(step.training_prompts, step.run_config.run.seed)
            return bool(sampler.state_dict()["fingerprint"] == state.get("fingerprint"))
    return False


def _unknown_order(step: RecordedStep) -> str:
    """Return why the order of the questions is not known."""
    if step.missing_prompts_reason:
        return step.missing_prompts_reason
    if step.config.rl.dynamic_sampling or step.config.rl.kind_weights:
        return "rl.dynamic_sampling or kind_weights draws more questions than it uses"
    return "no checkpoint says that the run drew from the questions that were read here"
