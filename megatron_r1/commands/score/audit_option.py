"""`megatron-r1 score --audit GRADED.jsonl`, or a run's folder: how often its rewards are wrong, by
a second reader."""

import asyncio
import json as json_format
import os
from pathlib import Path

from r1_grading import RewardPool
from r1_grading.base.errors import shorten

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.commands.score.audited_responses import OPTION, read_audited_responses, read_run
from megatron_r1.commands.score.verifier_audit import (
    NUM_GROUPS,
    SAMPLE_SIZE,
    Advantages,
    Audit,
    audit_verifier,
)
from megatron_r1.config import Config, RLConfig
from megatron_r1.controller import algorithms
from megatron_r1.evaluation.fraction_intervals import FractionEstimate
from megatron_r1.evaluation.second_verdicts import MATH_VERIFY, PooledSecondReader
from megatron_r1.evaluation.verifier_errors import AUDITED_REWARDS, AuditedResponse, ErrorRates

VERIFIERS = ("math", MATH_VERIFY)
MAX_SHOWN = 20
"""As many of the responses concerned are printed; --json has all."""


def run(
    config: Config,
    path: str,
    size: str = str(SAMPLE_SIZE),
    groups: str = str(NUM_GROUPS),
    seed: str = "0",
    verifier: str = VERIFIERS[0],
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
        verifier: what graded mathematics; verdicts of math-verify are not read by math-verify.
        json: a file for the result.

    Raises:
        UserError: a file or line that cannot be read, an option that is no such number, a run
            without a sample log, and a file without a line that can be audited."""
    if verifier not in VERIFIERS:
        raise UserError(
            f"--verifier {verifier}: give {' or '.join(VERIFIERS)}, whichever graded the "
            "mathematics (other verifiers: math)",
            key="--verifier",
            cause=Cause.UNKNOWN,
        )
    minimums = {"size": 1, "groups": 0, "seed": 0}
    sizes = {"size": size, "groups": groups, "seed": seed}
    numbers = {
        name: _parse_number(f"--{name}", text, minimums[name]) for name, text in sizes.items()
    }
    advantages = None
    if Path(path).is_dir():
        config, responses = read_run(Path(path))
        advantages = _advantages_of(config.rl)
    else:
        responses = list(read_audited_responses(Path(path), config.data.kind))
    if not any(response.can_be_audited for response in responses):
        kinds = sorted({response.kind for response in responses if response.total is not None})
        raise UserError(
            f"{path}: nothing can be audited; it has {', '.join(kinds) or 'no grade'}, and a "
            f"second reader is there for {' and '.join(AUDITED_REWARDS)}",
            key=OPTION,
            cause=Cause.EMPTY,
        )
    without_math_verify = verifier == MATH_VERIFY
    result = asyncio.run(
        _audit_responses(config, responses, advantages, without_math_verify, **numbers)
    )
    print("\n".join(describe_audit(result, path)))
    if json is not None:
        text = json_format.dumps(result.as_json(), indent=1, ensure_ascii=True)
        atomic_write(Path(json), f"{text}\n".encode())


async def _audit_responses(
    config: Config,
    responses: list[AuditedResponse],
    advantages: Advantages | None,
    without_math_verify: bool,
    size: int,
    groups: int,
    seed: int,
) -> Audit:
    settings = config.rewards
    cores = len(os.sched_getaffinity(0))
    workers = settings.workers if "workers" in settings.model_fields_set else cores
    async with RewardPool(workers, settings.timeout_seconds, settings.memory_bytes) as pool:
        second_reader = PooledSecondReader(
            pool, settings.call_options, without_math_verify=without_math_verify
        )
        return await audit_verifier(
            responses,
            second_reader.read,
            size=size,
            seed=seed,
            num_groups=groups,
            advantages=advantages,
        )


def _advantages_of(rl: RLConfig) -> Advantages:
    compute_advantages = algorithms.find_algorithm(rl.algorithm).outcome_advantages
    return lambda rewards: compute_advantages(rewards, rl)


def _parse_number(name: str, text: str, minimum: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise UserError(
            f"{name} {text}: give a whole number, {minimum} or more",
            key=name,
            cause=Cause.OUT_OF_RANGE,
        )
    return int(text)


def describe_audit(result: Audit, path: str) -> list[str]:
    """Return the lines that are printed."""
    lines = [
        f"{path}: {result.num_responses:,} verdicts, {len(result.judged):,} read a second time"
    ]
    if result.num_ungraded:
        lines.append(f"not audited: {result.num_ungraded:,} that could not be graded")
    for kind, count in result.without_reader.items():
        lines.append(f"not audited: {count:,} of {kind}, which has no second reader")
    lines += ["", f"{'data source':24} {'wrongly rejected':>38} {'wrongly accepted':>38}"]
    rates = {**result.sources, **({"all": result.overall} if len(result.sources) != 1 else {})}
    lines += [_format_row(name, rate) for name, rate in rates.items()]
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
    for response, second_verdict in result.concerned[:MAX_SHOWN]:
        verdict = "accepted" if response.is_accepted else "rejected"
        reason = shorten(second_verdict.reason, 160)
        lines.append(f"  {second_verdict.outcome:9} {verdict:8} {response.id}: {reason}")
    if len(result.concerned) > MAX_SHOWN:
        lines.append("  … --json FILE has all")
    return lines


def _format_row(name: str, rates: ErrorRates) -> str:
    fractions = (
        _format_fraction(fraction) for fraction in (rates.wrongly_rejected, rates.wrongly_accepted)
    )
    return f"{shorten(name, 24):24} " + " ".join(f"{cell:>38}" for cell in fractions)


def _format_fraction(fraction: FractionEstimate | None) -> str:
    """Return "2.0% (0.3% to 7.1%), 1+3? of 50": wrong and undecided ones of those drawn."""
    if fraction is None:
        return "-"
    value = "?" if fraction.value is None else f"{fraction.value:.1%}"
    count = f"{fraction.num_found}"
    if fraction.num_undecided:
        count += f"+{fraction.num_undecided}?"
    interval = f"{fraction.low:.1%} to {fraction.high:.1%}"
    return f"{value} ({interval}), {count} of {fraction.num_sampled:,}"
