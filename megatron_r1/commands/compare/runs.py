"""Compares two runs: their settings, and the steps, logs and checkpoints that both have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.compare.difference import RunDifference
from megatron_r1.commands.compare.records import (
    compare_groups,
    compare_metrics,
    missing_groups,
    read_groups,
)
from megatron_r1.commands.compare.tensors import are_same_files, changed_files, compare_checkpoints
from megatron_r1.config import RESUMABLE
from megatron_r1.config.setting_keys import changed_keys, flatten_sections, is_within, value_text
from megatron_r1.controller.rollouts.sample_log import step_log_path
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints.checkpoint_folders import (
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
)
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE

MAX_IN_ORDER = 64
"""Of at most as many pairs of checkpoints none is passed over."""
IGNORED_SETTINGS = (
    *(key for key in RESUMABLE if key.startswith("run.")),
    "checkpoint",
    "rl.sample_log",
    "rl.keep_sample_log",
    "eval",
)
"""Settings that change nothing of what is compared."""


@dataclass(frozen=True)
class RunComparison:
    """What two runs have in common, and where they part.

    Attributes:
        settings: a line per setting that differs.
        num_steps: how many steps both have finished.
        num_logs: how many of them both have a sample log of.
        checkpoints: the steps that both have a checkpoint of.
        differences: every difference that was found, in the order of steps and phases. Of
            checkpoints it has those of the first pair that differs, and of the first that differs
            by more than rounding.
        damaged_files: a line per file that is not as it was written.
        num_read_checkpoints: the number of pairs of checkpoints that were read."""

    settings: list[str]
    num_steps: int
    num_logs: int
    checkpoints: list[int]
    differences: list[RunDifference]
    damaged_files: list[str]
    num_read_checkpoints: int

    @property
    def first_difference(self) -> RunDifference | None:
        """The first difference of any bit."""
        return next(iter(self.differences), None)

    @property
    def first_beyond_rounding(self) -> RunDifference | None:
        """The first difference that is more than rounding."""
        return next(
            (difference for difference in self.differences if not difference.is_rounding), None
        )


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Return where two runs part.

    Args:
        first: the folder of one run.
        second: the folder of the other.

    Raises:
        UserError: a folder without a run, or two without a step in common."""
    folders = [RunFolder(path) for path in (first, second)]
    settings = [flatten_sections(_read_settings(folder)) for folder in folders]
    lines = [{line["step"]: line for line in folder.read_metrics()} for folder in folders]
    shared_steps = sorted(lines[0].keys() & lines[1].keys())
    if not shared_steps:
        raise UserError(
            f"{first} and {second} have no finished step in common, so nothing can be compared",
            key="OTHER_RUN",
            cause=Cause.EMPTY,
        )
    # The coarser of the two bounds what can be expected.
    dtype = max(map(_read_dtype, folders, settings), key=ROUNDING_BY_DTYPE.__getitem__)
    differences: list[RunDifference] = []
    damaged_files: list[str] = []
    num_logs = 0
    # All steps: where engines' log-probabilities alone differ, weights never need to.
    for step in shared_steps:
        logs = [read_groups(step_log_path(folder.sample_log, step)) for folder in folders]
        if logs[0] is not None and logs[1] is not None:
            faults = missing_groups(logs[0], logs[1])
            damaged_files += faults
            differences += compare_groups(step, logs[0], logs[1], dtype, bool(faults))
            num_logs += 1
        differences += compare_metrics(step, lines[0][step], lines[1][step], dtype)
    pairs = _pair_checkpoints(*(folder.checkpoints for folder in folders))
    changed_settings = [
        key for key in changed_keys(*settings) if not is_within(key, IGNORED_SETTINGS)
    ]
    has_same_layout = not any(is_within(key, ("parallel",)) for key in changed_settings)
    checkpoints = _ComparedCheckpoints(dtype, has_same_layout)
    differences += checkpoints.first_differences(pairs)
    return RunComparison(
        [
            f"{key}: {value_text(settings[0], key)} and {value_text(settings[1], key)}"
            for key in changed_settings
        ],
        len(shared_steps),
        num_logs,
        [step for step, *_ in pairs],
        sorted(differences, key=lambda difference: difference.order),
        damaged_files + checkpoints.damaged_files,
        len(checkpoints.by_step),
    )


def _read_settings(folder: RunFolder) -> dict[str, Any]:
    """Return the settings that a run began with, from its config.yaml.

    Raises:
        UserError: a folder without a run.
    """
    settings = folder.read_config()
    if not settings:
        raise UserError(
            f"{folder.path}: no config.yaml is here; give the folder of a run",
            key="RUN",
            cause=Cause.NOT_FOUND,
        )
    return settings


def _read_dtype(folder: RunFolder, settings: dict[str, Any]) -> str:
    """Return what a run computes in.

    Raises:
        UserError: its config.yaml does not say so.
    """
    dtype = settings.get("model.dtype")
    if dtype not in ROUNDING_BY_DTYPE:
        raise UserError(
            f"{folder.config_path}: model.dtype is {value_text(settings, 'model.dtype')}, not one "
            f"of {', '.join(ROUNDING_BY_DTYPE)}; restore the file",
            key="RUN",
            cause=Cause.MALFORMED,
        )
    return str(dtype)


Pair = tuple[int, Path, Path]
"""A step, and the checkpoint of either run after it."""


def _pair_checkpoints(first: Path, second: Path) -> list[Pair]:
    steps = [set(map(checkpoint_step, complete_checkpoints(folder))) for folder in (first, second)]
    return [
        (step, checkpoint_path(first, step), checkpoint_path(second, step))
        for step in sorted(steps[0] & steps[1])
    ]


@dataclass
class _ComparedCheckpoints:
    """The pairs of checkpoints that were read.

    Attributes:
        dtype: what the runs compute in.
        has_same_layout: whether both runs have one layout.
        by_step: what differs in each pair.
        damaged_files: a line per file that is not as it was written."""

    dtype: str
    has_same_layout: bool
    by_step: dict[int, list[RunDifference]] = field(default_factory=dict)
    damaged_files: list[str] = field(default_factory=list)

    def first_differences(self, pairs: list[Pair]) -> list[RunDifference]:
        """Return what differs in the first pair that differs, and in the first that differs by more
        than rounding."""
        search = self._first_in_order if len(pairs) <= MAX_IN_ORDER else self._first_by_bisection
        steps = {search(pairs, ignores_rounding) for ignores_rounding in (False, True)}
        return [
            difference for step in steps if step is not None for difference in self.by_step[step]
        ]

    def _first_in_order(self, pairs: list[Pair], ignores_rounding: bool) -> int | None:
        return next((pair[0] for pair in pairs if self._pair_differs(pair, ignores_rounding)), None)

    def _first_by_bisection(self, pairs: list[Pair], ignores_rounding: bool) -> int | None:
        """Return the step of the first pair that differs, where runs that have parted stay apart
        and differences of rounding grow."""
        low, high = 0, len(pairs)
        while low < high:
            middle = (low + high) // 2
            if self._pair_differs(pairs[middle], ignores_rounding):
                high = middle
            else:
                low = middle + 1
        return pairs[low][0] if low < len(pairs) else None

    def _pair_differs(self, pair: Pair, ignores_rounding: bool) -> bool:
        step, *folders = pair
        if step not in self.by_step:
            self.by_step[step] = self._checkpoint_differences(step, *folders)
        return any(
            not (ignores_rounding and difference.is_rounding) for difference in self.by_step[step]
        )

    def _checkpoint_differences(self, step: int, first: Path, second: Path) -> list[RunDifference]:
        damaged_files = [
            f"{folder}: {fault}" for folder in (first, second) for fault in changed_files(folder)
        ]
        self.damaged_files += damaged_files
        if not damaged_files and are_same_files(first, second):
            return []
        return compare_checkpoints(step, first, second, self.dtype, self.has_same_layout)
