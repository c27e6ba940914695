"""`megatron-r1 score --audit GRADED.jsonl`, or a run's folder: how often its rewards are wrong, by
a second method."""

import asyncio
import json as json_format
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from r1_grading import RewardPool
from r1_grading.base.errors import shorten
from r1_grading.rewards import UNGRADED

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config, RLConfig
from megatron_r1.controller import algorithms
from megatron_r1.controller.loop import training_reward
from megatron_r1.controller.verifier_audit import (
    NUM_GROUPS,
    SAMPLE_SIZE,
    Advantages,
    Audit,
    audit,
    logged_responses,
    source_of,
)
from megatron_r1.data.table_files import describe_json_error
from megatron_r1.evaluation.fraction_intervals import FractionEstimate
from megatron_r1.evaluation.verifier_errors import (
    AUDITED_REWARDS,
    AnswerContent,
    AuditedResponse,
    ErrorRates,
    SecondMethodJudge,
)
from megatron_r1.reporting.formatting import finite_metric
from megatron_r1.why.record.step_reader import examinable, open_run, read_steps

OPTION = "--audit"
GROUP_FIELDS = ("group", "prompt_id", "question")
"""Fields that the responses to one question share, the first that is there."""
OMITTED_FIELDS = ("kind", "response", "truth", "reward", "reason", "group", "prompt_id", "index")
"""Fields that the second method does not get as arguments."""
MAX_RESPONSES = 10_000
"""Steps of a run are read until there are as many responses."""
MAX_SHOWN = 20
"""As many of the responses concerned are printed; --json has all."""


def run(
    config: Config,
    path: str,
    size: str = str(SAMPLE_SIZE),
    groups: str = str(NUM_GROUPS),
    seed: str = "0",
    json: str | None = None,
) -> None:
    """Audit the rewards of a file or of a run's logged steps, and print the result.

    Args:
        config: section `rewards`, as for `score`, and `data.kind`.
        path: lines as `score` writes them: response, truth, reward, and a kind; or the folder of
            a run, whose newest logged steps are read.
        size: how many responses to draw.
        groups: how many questions to judge whole.
        seed: the seed of the draws.
        json: a file for the result.

    Raises:
        UserError: a file or line that cannot be read, an option that is no such number, a run
            without a sample log, and a file without a line that can be audited."""
    minimums = {"size": 1, "groups": 0, "seed": 0}
    sizes = {"size": size, "groups": groups, "seed": seed}
    numbers = {name: _number(f"--{name}", text, minimums[name]) for name, text in sizes.items()}
    advantages = None
    if Path(path).is_dir():
        config, responses = read_run(Path(path))
        advantages = _advantages_of(config.rl)
    else:
        responses = list(read_responses(Path(path), config.data.kind))
    if not any(response.can_be_audited for response in responses):
        kinds = sorted({response.kind for response in responses if response.total is not None})
        raise UserError(
            f"{path}: nothing can be audited; it has {', '.join(kinds) or 'no grade'}, and a "
            f"second method is there for {' and '.join(AUDITED_REWARDS)}",
            key=OPTION,
            cause=Cause.EMPTY,
        )
    result = asyncio.run(_audit(config, responses, advantages, **numbers))
    print("\n".join(describe(result, path)))
    if json is not None:
        text = json_format.dumps(result.as_json(), indent=1, ensure_ascii=True)
        atomic_write(Path(json), f"{text}\n".encode())


async def _audit(
    config: Config,
    responses: list[AuditedResponse],
    advantages: Advantages | None,
    size: int,
    groups: int,
    seed: int,
) -> Audit:
    settings = config.rewards
    cores = len(os.sched_getaffinity(0))
    workers = settings.workers if "workers" in settings.model_fields_set else cores
    async with RewardPool(workers, settings.timeout_seconds, settings.memory_bytes) as pool:
        methods = SecondMethodJudge(pool, settings.call_options)
        return await audit(
            responses,
            methods.judge,
            size=size,
            seed=seed,
            num_groups=groups,
            advantages=advantages,
        )


def _advantages_of(rl: RLConfig) -> Advantages:
    compute_advantages = algorithms.find(rl.algorithm).response_advantages
    return lambda rewards: compute_advantages(rewards, rl)


def read_run(path: Path) -> tuple[Config, list[AuditedResponse]]:
    """Return a run's settings, and the graded responses of its newest logged steps: of as many as
    have `MAX_RESPONSES`, whose texts are in memory.

    Args:
        path: the run's folder.

    Raises:
        UserError: no run, or none of its steps has a sample log."""
    folder, settings = open_run(path)
    steps = [examinable_step.step for examinable_step in examinable(folder, settings)]
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


def read_responses(path: Path, kind: str | None) -> Iterator[AuditedResponse]:
    """Yield the graded lines of a file; their texts stay on disk.

    Args:
        path: the file.
        kind: the kind of lines that name none.

    Raises:
        UserError: a missing file, or a line (by number) without a response, kind or finite reward,
            or without the truth that a second method compares with."""
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _response(path, number, offset, line, kind)
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", key=OPTION, cause=Cause.UNREADABLE) from None


def _response(
    path: Path, number: int, offset: int, line: bytes, kind: str | None
) -> AuditedResponse:
    record = _record(path, number, line)
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
        load=lambda: _content(path, number, offset),
    )


def _content(path: Path, number: int, offset: int) -> AnswerContent:
    with open(path, "rb") as file:
        file.seek(offset)
        record = _record(path, number, file.readline())
    fields = {name: value for name, value in record.items() if name not in OMITTED_FIELDS}
    return AnswerContent(record["response"], record.get("truth"), fields)


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    fault = "it is no object"
    try:
        if isinstance(record := json_format.loads(line), dict):
            return record
    except (ValueError, RecursionError) as error:
        fault = f"it is not JSON: {describe_json_error(error)}"
    raise UserError(f"{path}:{number}: {fault}", key=OPTION, cause=Cause.MALFORMED)


def _number(name: str, text: str, minimum: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise UserError(
            f"{name} {text}: give a whole number, {minimum} or more",
            key=name,
            cause=Cause.OUT_OF_RANGE,
        )
    return int(text)


def describe(result: Audit, path: str) -> list[str]:
    """Return the lines that are printed."""
    lines = [
        f"{path}: {result.num_responses:,} verdicts, {len(result.judged):,} read a second time"
    ]
    if result.num_ungraded:
        lines.append(f"not audited: {result.num_ungraded:,} that could not be graded")
    for kind, count in result.without_method.items():
        lines.append(f"not audited: {count:,} of {kind}, which has no second method")
    lines += ["", f"{'data source':24} {'wrongly rejected':>38} {'wrongly accepted':>38}"]
    rates = {**result.sources, **({"all": result.overall} if len(result.sources) != 1 else {})}
    lines += [_row(name, rate) for name, rate in rates.items()]
    if (effect := result.effect) is not None:
        change = effect.mean_change
        ends = "" if change.low is None else f" ({change.low:.3f} to {change.high:.3f})"
        signs = _format_fraction(effect.sign_changes)
        lines += [
            "",
            f"corrected in {effect.num_drawn:,} of {effect.num_groups:,} groups: advantages change "
            f"by {change.value:.3f}{ends} in the mean, and their signs in {signs} of the groups",
        ]
    if result.concerned:
        lines += ["", f"verdicts that are wrong or undecided: {len(result.concerned):,}"]
    for response, finding in result.concerned[:MAX_SHOWN]:
        verdict = "accepted" if response.is_accepted else "rejected"
        lines.append(
            f"  {finding.outcome:9} {verdict:8} {response.id}: {shorten(finding.reason, 160)}"
        )
    if len(result.concerned) > MAX_SHOWN:
        lines.append("  … --json FILE has all")
    return lines


def _row(name: str, rates: ErrorRates) -> str:
    fractions = (
        _format_fraction(fraction) for fraction in (rates.wrongly_rejected, rates.wrongly_accepted)
    )
    return f"{shorten(name, 24):24} " + " ".join(f"{cell:>38}" for cell in fractions)


def _format_fraction(fraction: FractionEstimate | None) -> str:
    """Return "2.0% (0.3% to 7.1%), 1+3 of 50": wrong and undecided ones of those drawn."""
    if fraction is None:
        return "-"
    value = "?" if fraction.value is None else f"{fraction.value:.1%}"
    count = f"{fraction.num_found}"
    if fraction.num_undecided:
        count += f"+{fraction.num_undecided}?"
    interval = f"{fraction.low:.1%} to {fraction.high:.1%}"
    return f"{value} ({interval}), {count} of {fraction.num_sampled:,}"
