"""Graded responses that an audit reads: the lines of a file, or a run's newest logged steps."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from r1_grading.rewards import UNGRADED

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.score.verifier_audit import logged_responses, source_of
from megatron_r1.config import Config
from megatron_r1.controller.loop import training_reward
from megatron_r1.data.table_files import describe_json_error
from megatron_r1.evaluation.verifier_errors import AUDITED_REWARDS, AnswerContent, AuditedResponse
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.record.examinable_steps import examinable_steps, open_run
from megatron_r1.why.record.step_reader import read_steps

OPTION = "--audit"
GROUP_FIELDS = ("group", "prompt_id", "question")
"""Fields that the responses to one question share, the first that is there."""
OMITTED_FIELDS = ("kind", "response", "truth", "reward", "reason", "group", "prompt_id", "index")
"""Fields that the second reader does not get as arguments."""
MAX_RESPONSES = 10_000
"""Steps of a run are read until there are as many responses."""


def read_run(path: Path) -> tuple[Config, list[AuditedResponse]]:
    """Return a run's settings, and the graded responses of its newest logged steps: of as many as
    have `MAX_RESPONSES`, whose texts are in memory.

    Args:
        path: the run's folder.

    Raises:
        UserError: no run, or none of its steps has a sample log."""
    folder, settings = open_run(path)
    steps = [examinable_step.step for examinable_step in examinable_steps(folder, settings)]
    if not steps:
        raise UserError(
            f"{path}: no finished step has a sample log; start the run with "
            "--rl.keep_sample_log true",
            key=OPTION,
            cause=Cause.EMPTY,
        )
    responses: list[AuditedResponse] = []
    audited_steps: list[int] = []
    opens_thought: bool | None = None  # of all steps: the model and data.template are the run's
    for recorded_step in read_steps(folder, settings, reversed(steps)):
        if opens_thought is None:
            opens_thought = recorded_step.tokenizer.opens_thought
        responses += logged_responses(
            recorded_step.groups,
            f"step {recorded_step.step}",
            recorded_step.reward_weights,
            partial(training_reward, config=recorded_step.config),
            opens_thought,
        )
        audited_steps.append(recorded_step.step)
        if len(responses) >= MAX_RESPONSES:
            break
    num_older = len(steps) - len(audited_steps)
    print(
        f"{path}: steps {audited_steps[-1]} to {audited_steps[0]}, {num_older} older ones left out"
    )
    return settings, responses


def read_audited_responses(path: Path, kind: str | None) -> Iterator[AuditedResponse]:
    """Yield the graded lines of a file; their texts stay on disk.

    Args:
        path: the file.
        kind: the kind of lines that name none.

    Raises:
        UserError: a missing file, or a line (by number) without a response, kind or finite reward,
            or without the truth that a second reader compares with."""
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_response(path, number, offset, line, kind)
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", key=OPTION, cause=Cause.UNREADABLE) from None


def _parse_response(
    path: Path, number: int, offset: int, line: bytes, kind: str | None
) -> AuditedResponse:
    record = _parse_record(path, number, line)
    place = f"{path}:{number}"
    is_ungraded = str(record.get("reason", "")).startswith(UNGRADED)
    kind = record.get("kind", kind)
    reward: Any = record.get("reward")
    validity = {
        "kind": isinstance(kind, str),
        "response": isinstance(record.get("response"), str),
        "reward": finite_metric(record, "reward") is not None,
        "truth": kind not in AUDITED_REWARDS or is_ungraded or record.get("truth") is not None,
    }
    wrong_fields = [name for name, is_valid in validity.items() if not is_valid]
    if not is_ungraded and wrong_fields:
        cause = Cause.MISSING if record.get(wrong_fields[0]) is None else Cause.MALFORMED
        hint = "; name it by --data.kind" if wrong_fields[0] == "kind" else ""
        raise UserError(
            f"{place}: {wrong_fields[0]!r} is {cause.value}{hint}; an audit reads what "
            "megatron-r1 score writes",
            key=wrong_fields[0],
            cause=cause,
        )
    group = next((str(record[name]) for name in GROUP_FIELDS if name in record), None)
    if group is None and {"id", "index"} <= record.keys():  # a line of eval's samples.jsonl
        group = f"{record.get('benchmark')} {record['id']}"
    return AuditedResponse(
        id=place,
        source=source_of(record),
        kind=str(kind),
        group=group,
        reward=0.0 if is_ungraded else float(reward),
        total=None if is_ungraded else float(reward),
        load=lambda: _read_content(path, number, offset),
    )


def _read_content(path: Path, number: int, offset: int) -> AnswerContent:
    with open(path, "rb") as file:
        file.seek(offset)
        record = _parse_record(path, number, file.readline())
    fields = {name: value for name, value in record.items() if name not in OMITTED_FIELDS}
    return AnswerContent(record["response"], record.get("truth"), fields)


def _parse_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    fault = "it is no object"
    try:
        if isinstance(record := json.loads(line), dict):
            return record
    except (ValueError, RecursionError) as error:
        fault = f"it is not JSON: {describe_json_error(error)}"
    raise UserError(f"{path}:{number}: {fault}", key=OPTION, cause=Cause.MALFORMED)
