"""Finds where two runs part: `megatron-r1 compare RUN OTHER_RUN [--json FILE]`.

The verb compares settings, every step's metrics and sample log, and checkpoints, in their order up
to the first that differs by more than rounding; of more than `MAX_IN_ORDER` pairs by bisection.
Two runs of one recipe can be equal bit for bit; in another layout, version, machine or dtype up to
rounding. The answer is the first step, phase, rank and tensor that part, with the distance; where
no log or checkpoint covers a step, the interval. To keep both of every step:
`--rl.keep_sample_log true --checkpoint.keep_every 1`. Neither folder is changed. Exit status 0:
nothing differs by more than rounding; 1: something does, or a file is not as it was written."""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_r1.base.errors import RunError
from megatron_r1.base.files import atomic_write
from megatron_r1.commands.compare.difference import RunDifference
from megatron_r1.commands.compare.runs import MAX_IN_ORDER, RunComparison, compare_runs
from megatron_r1.config import Config
from megatron_r1.reporting.formatting import format_count

ARGUMENTS = ("RUN", "OTHER_RUN")
SETTINGS = ()
OPTIONS = {"json": "FILE"}

MAX_SHOWN = 5
"""As many differences of one step are printed; --json has all."""


def run(config: Config, first: str, second: str, json: str | None = None) -> None:
    """Compare two runs and print where they part.

    Args:
        config: no setting of it is read.
        first: the folder of one run.
        second: the folder of the other.
        json: a file for the answer.

    Raises:
        UserError: a folder without a run, or two without a step in common.
        RunError: the runs differ by more than rounding, or a file is damaged."""
    comparison = compare_runs(Path(first), Path(second))
    if json is not None:
        atomic_write(Path(json), _as_json(comparison))
    print("\n".join(_comparison_lines(comparison)))
    if difference := comparison.first_beyond_rounding:
        raise RunError(
            f"{first} and {second} differ at step {difference.step} by more than rounding"
        )
    if comparison.damaged_files:
        raise RunError(
            f"{first} and {second} cannot be called equal: {comparison.damaged_files[0]}; restore "
            "the file, or remove that checkpoint or log from both runs"
        )


def _comparison_lines(comparison: RunComparison) -> Iterable[str]:
    yield from (f"setting {line}" for line in comparison.settings)
    yield (
        f"compared: metrics of {format_count(comparison.num_steps, 'step')}, "
        f"sample logs of {comparison.num_logs}, checkpoints of {len(comparison.checkpoints)}"
    )
    if is_bisected := len(comparison.checkpoints) > MAX_IN_ORDER:
        yield (
            f"by bisection {comparison.num_read_checkpoints} of them were read: a difference in "
            "one checkpoint alone, which is gone in the next, may be missed"
        )
    yield from (f"damaged: {line}" for line in comparison.damaged_files)
    first, larger_difference = comparison.first_difference, comparison.first_beyond_rounding
    if first is None:
        if comparison.damaged_files:
            yield "nothing else differs"
        else:
            yield "equal: no bit differs" + (" in what was read" if is_bisected else "")
        return
    yield from _step_lines(comparison, first, "first difference")
    if larger_difference is None:
        yield "equal to rounding: every difference is of that size"
    elif larger_difference is not first:
        yield from _step_lines(comparison, larger_difference, "first difference beyond rounding")


def _step_lines(comparison: RunComparison, first: RunDifference, title: str) -> Iterable[str]:
    """Yield a difference, the others of its step, and where nothing was compared before it."""
    yield f"{title}: {first}"
    later_differences = [
        difference
        for difference in comparison.differences
        if difference.step == first.step
        and difference is not first
        and difference.order > first.order
    ]
    yield from (f"  {difference}" for difference in later_differences[:MAX_SHOWN])
    if len(later_differences) > MAX_SHOWN:
        yield f"  and {len(later_differences) - MAX_SHOWN} more"
    if first.step not in comparison.checkpoints:
        later_steps = [step for step in comparison.checkpoints if step > first.step]
        next_text = f"that of step {later_steps[0]} is the next" if later_steps else "none is later"
        yield f"  both kept no checkpoint of step {first.step}, so no tensor is named: {next_text}"
    equal_step = max((step for step in comparison.checkpoints if step < first.step), default=0)
    if equal_step < first.step - 1:
        yield f"  its cause may be of any step from {equal_step + 1} on: no checkpoint lies between"


def _as_json(comparison: RunComparison) -> str:
    first, larger_difference = comparison.first_difference, comparison.first_beyond_rounding
    content = {
        "settings": comparison.settings,
        "steps": comparison.num_steps,
        "sample_logs": comparison.num_logs,
        "checkpoints": comparison.checkpoints,
        "read_checkpoints": comparison.num_read_checkpoints,
        "damaged": comparison.damaged_files,
        "first": first.as_json() if first is not None else None,
        "first_beyond_rounding": (
            larger_difference.as_json() if larger_difference is not None else None
        ),
        "differences": [difference.as_json() for difference in comparison.differences],
    }
    return json.dumps(content, indent=1)
