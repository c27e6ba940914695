"""Times the kernels compared with their peers, and judges what was measured:
`python -m tools.gpu_check.kernel_times FILE.json OPTION…`, options of `python tools/bench kernels`.

Kernels that the time did not suffice for are named; a kernel that failed, or whose error against
fp64 is several times eager PyTorch's, is a failure."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1_kernels_bench.implementations import OURS, TOO_LATE

from tools.bench.host import ROOT, run_to_end
from tools.gpu_check import verdict
from tools.gpu_check.verdict import CheckFailed

EAGER = "eager PyTorch"
WORSE = 4.0
"""Times the error of eager PyTorch."""
ROUNDING = 1e-6


def evaluate(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the microseconds of each kernel, and its share of the bound.

    Raises:
        CheckFailed: a kernel failed, its result is wrong, or no kernel was measured.
    """
    figures: dict[str, Any] = {}
    for case in cases:
        name, rows = case["kernel"], {row["name"]: row for row in case["rows"]}
        kernel_row = rows.get(OURS)
        if case["failed"] == TOO_LATE:
            figures[name] = "no time"
        elif case["failed"] or kernel_row is None or not kernel_row["median_seconds"]:
            reason = (
                case["failed"] or (kernel_row and kernel_row["not_run"]) or "no time was measured"
            )
            raise CheckFailed(f"{name}: {reason}", **figures)
        else:
            fraction = kernel_row["share_of_bound"]
            bound_text = f", {fraction:.0%} of the bound" if fraction else ""
            figures[name] = f"{1e6 * kernel_row['median_seconds']:.0f} µs{bound_text}"
            _compare_errors(
                name, kernel_row["errors"], rows.get(EAGER, {}).get("errors", {}), figures
            )
    if not set(figures.values()) - {"no time"}:
        raise CheckFailed("no kernel was measured")
    return figures


def _compare_errors(
    name: str,
    kernel_errors: Mapping[str, float],
    eager_errors: Mapping[str, float],
    figures: Mapping[str, Any],
) -> None:
    for quantity in kernel_errors.keys() & eager_errors.keys():
        if not kernel_errors[quantity] <= WORSE * eager_errors[quantity] + ROUNDING:
            values = f"{kernel_errors[quantity]:.3g}, of {EAGER} {eager_errors[quantity]:.3g}"
            raise CheckFailed(f"{name}: the error of {quantity} is {values}", **figures)


def check(file: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run the bench and judge it."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench"),
        "kernels",
        *options,
        "--json",
        str(file),
    ]
    print(run_to_end(command), flush=True)
    return evaluate(json.loads(file.read_text())["cases"])


if __name__ == "__main__":
    sys.exit(verdict.run(lambda: check(Path(sys.argv[1]), sys.argv[2:])))
