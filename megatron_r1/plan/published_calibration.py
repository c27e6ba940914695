"""Calibrates the plan's free efficiencies by half of the published runs; the other half shows the
plan's error.

The free numbers are those of `FIRST_GUESSES`. Their values minimize the sum of squares of
ln(predicted / published) over the calibrating rows, plus a quarter of the squares of ln(value /
first guess): a number at twice its guess costs as much as a row that is off by 1.4. The defaults of
`Assumptions` are these values, in two digits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.plan.published_runs import PublishedRun

FIRST_GUESSES = {
    "compute_efficiency": 0.45,
    "link_efficiency": 0.75,
    "bandwidth_efficiency": 0.6,
    "decode_latency_per_layer": 150e-6,
}
"""The calibrated numbers with their first guesses, which the plan had before the calibration."""
GUESS_WEIGHT = 0.25
"""What the square of ln(value / guess) costs, where that of ln(predicted / published) costs 1."""
SPREAD_DEVIATIONS = 1.645
"""Standard deviations of the calibrating rows' ln(predicted / published) within `time_spread`:
those of a normal distribution's middle 90%."""
MAX_STEPS, SLOPE_STEP = 8, 0.02
"""Most steps of the calibration, and the change of a logarithm that shows its slope."""


def calibrate_guesses(runs: Sequence[PublishedRun]) -> dict[str, float]:
    """Return the values of `FIRST_GUESSES` that `runs` determine, to two digits: Gauss-Newton
    steps in the logarithms, halved until they help."""
    guesses = np.log(list(FIRST_GUESSES.values()))
    logs, (residuals, cost) = guesses, _fit_residuals(runs, guesses, guesses)
    for _ in range(MAX_STEPS):
        slopes = [
            (_fit_residuals(runs, logs + change, guesses)[0] - residuals) / SLOPE_STEP
            for change in SLOPE_STEP * np.eye(len(logs))
        ]
        step = np.linalg.lstsq(np.transpose(slopes), -residuals, rcond=None)[0]
        for part in (1.0, 0.5, 0.25):
            trial_logs = np.minimum(logs + part * step, 0)  # all are below 1
            trial_residuals, trial_cost = _fit_residuals(runs, trial_logs, guesses)
            if trial_cost < cost:
                break
        else:
            break
        logs, residuals, cost = trial_logs, trial_residuals, trial_cost
    return {name: float(f"{value:.2g}") for name, value in _values_of_logs(logs).items()}


def _values_of_logs(logs: np.ndarray) -> dict[str, float]:
    return dict(zip(FIRST_GUESSES, np.exp(logs).tolist(), strict=True))


def _fit_residuals(
    runs: Sequence[PublishedRun], logs: np.ndarray, guesses: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return what is squared: of each run, then of each number; and the sum of squares."""
    misses = [math.log(run.ratio(**_values_of_logs(logs))) for run in runs]
    residuals = np.concatenate([misses, math.sqrt(GUESS_WEIGHT) * (logs - guesses)])
    return residuals, float(residuals @ residuals)


def range_factor(runs: Sequence[PublishedRun], values: dict[str, float]) -> float:
    """Return the factor above and below an estimate within which nine of ten runs like these lie.

    It is e to the power of `SPREAD_DEVIATIONS` standard deviations, of as many rows as exceed the
    free numbers."""
    squares = sum(math.log(run.ratio(**values)) ** 2 for run in runs)
    return math.exp(SPREAD_DEVIATIONS * math.sqrt(squares / (len(runs) - len(FIRST_GUESSES))))


def mean_factor(ratios: Sequence[float]) -> float:
    """Return the mean error as a factor: e to the power of the mean of |ln ratio|."""
    return math.exp(sum(abs(math.log(ratio)) for ratio in ratios) / len(ratios))


@dataclass(frozen=True)
class RatiosOfSource:
    """How far the plan is off the runs of one source, or of all.

    Attributes:
        calibrated_ratios: ratios of the half that calibrates.
        heldout_ratios: those of the other half.
        unseen_ratios: those of all its rows, by a calibration without the source."""

    calibrated_ratios: list[float]
    heldout_ratios: list[float]
    unseen_ratios: list[float]


def ratios_by_source(
    runs: Sequence[PublishedRun], values: dict[str, float]
) -> dict[str, RatiosOfSource]:
    """Return the ratios of planned to published time by system; "all" has those of all systems."""
    by_system = {}
    for system in dict.fromkeys(run.system for run in runs):
        system_runs = [run for run in runs if run.system == system]
        calibrated_values = calibrate_guesses(
            [run for run in runs if run.is_for_calibration and run.system != system]
        )
        by_system[system] = RatiosOfSource(
            [run.ratio(**values) for run in system_runs if run.is_for_calibration],
            [run.ratio(**values) for run in system_runs if not run.is_for_calibration],
            [run.ratio(**calibrated_values) for run in system_runs],
        )
    parts = ("calibrated_ratios", "heldout_ratios", "unseen_ratios")
    all_ratios = {
        part: [r for ratios in by_system.values() for r in getattr(ratios, part)] for part in parts
    }
    return by_system | {"all": RatiosOfSource(**all_ratios)}
