"""The process that measures: reads its task from stdin, writes one JSON object per line to stdout.

{"case": name, "doing": what} before every step, so that the supervisor can name the step in which a
worker fell silent or died; {"case": name, "result": ...} after each case; {"case": name, "broken":
why} before it ends because the device no longer works. What peers print goes to stderr.

Of a case, every implementation is warmed up and checked, then all are timed in turns: a round times
each once, so that changes during a run (clocks, heat, other load) affect all of them alike. One
that fails becomes a row with the reason; its memory is freed before the next."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch

from r1_kernels_bench.cases import BY_NAME, KernelCase
from r1_kernels_bench.implementations import TOO_LATE, Implementation, describe_error
from r1_kernels_bench.inputs import ProblemSizes
from r1_kernels_bench.measure import CPUMeter, CUDAMeter

ENOUGH_SECONDS = {"cpu": 2.0, "cuda": 5.0}  # of timed calls of one row; each gets at least one
WARM_FRACTION = 0.75  # of a case's time, after which no further implementation is started


class Broken(Exception):
    """The device's context is lost: this process can measure nothing more."""


@lru_cache(maxsize=1)
def make_inputs(kind: Callable[..., Any], sizes: ProblemSizes, device: torch.device) -> Any:
    """Cached for the next case, which often has the same inputs.

    Args:
        kind: the class of the inputs.
        sizes: the sizes of the problem.
        device: the device of the tensors."""
    return kind(sizes, device)


def new_row(implementation: Implementation, device: torch.device, reason: str) -> dict[str, Any]:
    """Return a row without numbers. not_run: why it will get none; extra_bytes: the largest of all
    timed calls.

    Args:
        implementation: what the row is of.
        device: where it would run.
        reason: why it is not run; "" where it is."""
    row = {"name": implementation.name, "computes": implementation.computes, "not_run": reason}
    if implementation.gpu_only and device.type != "cuda":
        row["not_run"] = "runs on a GPU only"
    return {**row, "seconds": [], "extra_bytes": None, "errors": {}}


class Calls:
    """The calls of one case's implementations, from their warm-up to their first failure.

    A failure becomes the reason in the implementation's row. report(doing=...) is called before
    each step, for the supervisor.

    Args:
        inputs: the case's `Inputs`, with the exact results.
        measure: a `CPUMeter` or `CUDAMeter`, which returns a call's seconds and its extra bytes.
        report: writes its arguments as a line for the supervisor."""

    def __init__(self, inputs: Any, measure: Any, report: Callable[..., None]) -> None:
        self.inputs, self.measure, self.report = inputs, measure, report
        self.working: dict[str, Callable[[], Any]] = {}

    def warm_up(self, implementation: Implementation, row: dict[str, Any]) -> None:
        """Load it and compare the results of a first call with the exact ones."""

        def first_call() -> None:
            call = partial(implementation.call, implementation.load(), self.inputs)
            row["errors"] = self.inputs.errors(call())
            self.working[implementation.name] = call

        self._attempt_call(first_call, implementation, row)
        self._restore_inputs(implementation, row, settle=True)

    def time_once(self, implementation: Implementation, row: dict[str, Any]) -> None:
        """Add the seconds and the extra memory of one call to the row."""

        def timed_call() -> None:
            seconds, extra_bytes = self.measure(self.working[implementation.name])
            row["seconds"].append(seconds)
            if extra_bytes is not None:
                row["extra_bytes"] = max(row["extra_bytes"] or 0, extra_bytes)

        self._attempt_call(timed_call, implementation, row)
        self._restore_inputs(implementation, row, settle=implementation.name not in self.working)

    def _attempt_call(
        self, step: Callable[[], None], implementation: Implementation, row: dict[str, Any]
    ) -> None:
        self.report(doing=implementation.name)
        try:
            step()
        except Exception as error:
            self.working.pop(implementation.name, None)
            if not row["seconds"]:
                row["not_run"] = describe_error(error)

    def _restore_inputs(
        self, implementation: Implementation, row: dict[str, Any], settle: bool
    ) -> None:
        """Restore what the call overwrote, and free its memory if `settle`. This is not done in the
        handler of its exception, which holds the failed call's tensors."""
        try:
            if implementation.overwrites:
                self.inputs.restore()
            if settle:
                self.measure.settle()
        except RuntimeError as error:
            raise Broken(row["not_run"] or describe_error(error)) from error


def run_case(
    case: KernelCase,
    task: dict[str, Any],
    deadline: float,
    skip: dict[str, str],
    report: Callable[..., None],
) -> dict[str, Any]:
    """Return the case's bound and rows.

    Args:
        case: the table's kernel.
        task: sizes, device and repeats.
        deadline: time.time() by which it should end.
        skip: implementations that ended an earlier process, each with the reason.
        report: see `Calls`."""
    device, started_at = torch.device(task["device"]), time.time()
    report(doing="inputs")
    inputs = make_inputs(case.inputs, ProblemSizes(**task["sizes"]), device)
    bound = inputs.bound(case.gradients, case.masked)
    measure = CUDAMeter(device) if device.type == "cuda" else CPUMeter()
    calls = Calls(inputs, measure, report)
    rows = [
        new_row(implementation, device, skip.get(implementation.name, ""))
        for implementation in case.implementations
    ]
    pairs = list(zip(case.implementations, rows, strict=True))
    for implementation, row in pairs:
        if not row["not_run"] and time.time() > started_at + WARM_FRACTION * (
            deadline - started_at
        ):
            row["not_run"] = TOO_LATE
        if not row["not_run"]:
            calls.warm_up(implementation, row)
    bound_seconds = []
    measure(bound.call)
    for _ in range(task["repeats"]):
        report(doing="bound")
        bound_seconds.append(measure(bound.call).seconds)
        for implementation, row in pairs:
            is_enough = time.time() > deadline or sum(row["seconds"]) > ENOUGH_SECONDS[device.type]
            if implementation.name in calls.working and not (row["seconds"] and is_enough):
                calls.time_once(implementation, row)
    rate = bound.done / median(bound_seconds)
    bound_entry = {"name": bound.name, "unit": bound.unit, "rate": rate, "needed": bound.needed}
    return {"bound": bound_entry, "rows": rows}


def main() -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.load(sys.stdin)
    cases = [BY_NAME[name] for name in task["cases"]]
    for index, case in enumerate(cases):

        def report(case: KernelCase = case, **what: Any) -> None:
            lines.write(json.dumps({"case": case.name, **what}) + "\n")

        start = time.time()
        if start > task["deadline"]:
            report(result={"failed": TOO_LATE})
            continue
        fraction = case.weight / sum(remaining.weight for remaining in cases[index:])
        deadline = start + fraction * (task["deadline"] - start)
        try:
            result = run_case(case, task, deadline, task["skip"].get(case.name, {}), report)
        except Broken as broken:
            report(broken=str(broken))
            sys.exit(1)
        except Exception as error:  # the inputs did not fit: the other cases may
            result = {"failed": describe_error(error)}
        report(result=result)
    lines.write(json.dumps({"done": True}) + "\n")


if __name__ == "__main__":
    main()
