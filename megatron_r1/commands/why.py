"""Says why a run does not learn: `megatron-r1 why RUN [--step N] [--rerun engine,trainer]
[--memory GB] [--json FILE]`.

The verb recomputes a finished step from the run's folder and names the first quantity that departs:
its size, the tokens or responses concerned, their share of the loss, and the setting or file to
change. It compares the model's files, how the step was sampled, rewards, log-probabilities, loss
and metrics, the optimizer's step, and what was pushed, with transformers in float32, math-verify
and formulas of its own. What could not be checked is listed with the reason. "Nothing departs" is
an answer, too, with the families of quantities that could be checked where those are not all; what
it leaves is printed as suspicions. To keep what it reads of every step: `--rl.keep_sample_log true
--checkpoint.keep_every 1`. A model that does not fit into the free memory, or into --memory, is
read layer by layer; its updates are not made again. RUN/why.html has the whole table, the worst
responses and departures over position; nothing else is written there. Standard error shows each
departure as it is found, and before a search for its cause. Exit status 0: nothing departs; 1:
something does.

`--rerun engine` also starts an engine with the run's settings on the weights before the step, which
computes the log-probabilities again: if it gives the logged values, the engine's function differs
from transformers', and if it agrees with transformers, the run's engine had other weights or state.
`--rerun trainer` has one trainer rank without parallelism compute them: if it agrees with
transformers where the run's trainer does not, the run's layout is the cause."""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_r1.base.errors import Cause, RunError, UserError, did_you_mean
from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config
from megatron_r1.why import page
from megatron_r1.why.all_checks import examine_step
from megatron_r1.why.checks.reruns import RERUNS
from megatron_r1.why.comparison import EQUAL, NOT_CHECKED
from megatron_r1.why.record.examinable_steps import (
    ExaminableStep,
    choose_step,
    examinable_steps,
    open_run,
)
from megatron_r1.why.record.step_reader import read_step
from megatron_r1.why.step_report import Report

ARGUMENTS = ("RUN",)
SETTINGS = ()
OPTIONS = {
    "step": "N",
    "rerun": "engine|trainer|engine,trainer",
    "memory": "GB",
    "json": "FILE",
}


def run(
    config: Config,
    run: str,
    step: str | None = None,
    rerun: str | None = None,
    memory: str | None = None,
    json: str | None = None,
) -> None:
    """Examine a step of a run, print what departs and write RUN/why.html.

    Args:
        config: no setting of it is read.
        run: the run's folder.
        step: the step, as text; None: the newest with most left of it.
        rerun: what computes the log-probabilities again, with commas between; None: nothing.
        json: a file for the comparisons.
        memory: the memory that models may take, in GB as text; None: what is free.

    Raises:
        UserError: no run, or no step that can be examined.
        RunError: a quantity departs."""
    kinds = _parse_reruns(rerun)
    num_bytes = _num_bytes(memory)
    folder, settings = open_run(Path(run))
    steps = examinable_steps(folder, settings)
    chosen_step = choose_step(steps, _parse_step(step), folder.path)
    recorded_step = read_step(folder, settings, chosen_step.step)
    report = examine_step(
        recorded_step,
        num_bytes,
        kinds,
        partial(print, flush=True),
        partial(print, file=sys.stderr, flush=True),
    )
    if json is not None:
        atomic_write(Path(json), _as_json(report, steps))
    page_path = page.write_page(report, recorded_step)
    print(
        "\n".join(
            [*_describe_steps(steps, chosen_step), *_report_lines(report), f"page: {page_path}"]
        )
    )
    if report.first_departure is not None:
        raise RunError(f"{run}: {report.first_departure.name} departs at step {report.step}")


def _parse_reruns(rerun: str | None) -> list[str]:
    """Return the reruns that --rerun names, each once.

    Raises:
        UserError: it names another."""
    if rerun is None:
        return []
    kinds = [kind.strip() for kind in rerun.split(",")]
    for kind in kinds:
        if kind not in RERUNS:
            raise UserError(
                f"--rerun {rerun}: {kind!r} is not one of {', '.join(RERUNS)}; several have a "
                f"comma between them{did_you_mean(kind, RERUNS, '{}')}",
                key="--rerun",
                cause=Cause.UNKNOWN,
            )
    return list(dict.fromkeys(kinds))


def _parse_step(step: str | None) -> int | None:
    if step is None:
        return None
    if not (step.isascii() and step.isdecimal()) or int(step) < 1:
        raise UserError(
            f"--step {step}: give the number of a step, 1 or more",
            key="--step",
            cause=Cause.MALFORMED,
        )
    return int(step)


def _num_bytes(memory: str | None) -> int | None:
    if memory is None:
        return None
    try:
        num_bytes = float(memory) * 1e9
    except ValueError:
        num_bytes = math.nan
    if not 1 <= num_bytes < math.inf:
        raise UserError(
            f"--memory {memory}: give a number of GB, above 0",
            key="--memory",
            cause=Cause.MALFORMED,
        )
    return int(num_bytes)


def _describe_steps(steps: list[ExaminableStep], chosen_step: ExaminableStep) -> Iterator[str]:
    """Yield the steps that can be examined."""
    whole_steps = [step.step for step in steps if step.has_before and step.has_after]
    half_steps = [step.step for step in steps if step.step not in whole_steps]
    yield f"steps with log and both checkpoints: {_format_ranges(whole_steps) or 'none'}"
    if half_steps:
        yield f"steps with a log and not both checkpoints: {_format_ranges(half_steps)}"
    yield from (f"damaged checkpoint: step {s.step}: {s.damage}" for s in steps if s.damage)
    yield f"examined: step {chosen_step.step}"


def _format_ranges(steps: list[int]) -> str:
    """Return numbers as text, runs of them shortened: 1-4, 7."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _report_lines(report: Report) -> Iterator[str]:
    first = report.first_departure
    if first is None:
        yield report.all_clear
        yield from (f"  suspicion, no cause: {suspicion}" for suspicion in report.suspicions)
    else:
        yield f"first quantity that departs: {first}"
        other_comparisons = [
            comparison
            for comparison in report.comparisons
            if comparison.differs and comparison is not first
        ]
        yield from (f"  then {departure}" for departure in other_comparisons)
    num_equal = sum(
        not comparison.differs and comparison.status != NOT_CHECKED
        for comparison in report.comparisons
    )
    yield f"equal: {num_equal} quantities"
    names = {rerun.name for rerun in RERUNS.values()}
    yield from (
        f"rerun: {comparison}"
        for comparison in report.comparisons
        if comparison.status == EQUAL and comparison.name in names
    )
    yield from (
        f"not checked: {comparison}"
        for comparison in report.comparisons
        if comparison.status == NOT_CHECKED
    )


def _as_json(report: Report, steps: list[ExaminableStep]) -> str:
    return json.dumps({"steps": [step._asdict() for step in steps], **report.as_json()}, indent=1)
