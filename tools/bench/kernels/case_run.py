"""One table: every implementation warmed up and checked, then all timed in turns.

A round times each implementation once, so that changes during a run (clocks, heat, other load)
affect all of them alike. An implementation that fails becomes a row with the reason; its memory is
freed before the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

import torch

from tools.bench.kernels.cases import Case
from tools.bench.kernels.implementation import TOO_LATE, Call, Implementation, why
from tools.bench.kernels.measure import meter
from tools.bench.kernels.sizes import Sizes

ENOUGH_SECONDS = {"cpu": 2.0, "cuda": 5.0}  # of timed calls of one row; each gets at least one
WARM_SHARE = 0.75  # of a case's time, after which no further implementation is started


@dataclass
class Row:
    """not_run: why there are no numbers. extra_bytes: the largest of all timed calls."""

    name: str
    computes: str
    not_run: str = ""
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)


class Broken(Exception):
    """The device's context is lost: this process can measure nothing more."""


@lru_cache(maxsize=1)
def make_inputs(kind: type, sizes: Sizes, device: torch.device) -> Any:
    """Cached for the next case, which often has the same inputs."""
    return kind(sizes, device)


class CaseRun:
    """Measures one case.

    until: time.time() by which it should end. skip: implementations that ended an earlier process,
    each with the reason. report(doing=...) is called before each step, for the supervisor.
    """

    def __init__(
        self,
        case: Case,
        sizes: Sizes,
        device: torch.device,
        until: float,
        skip: dict[str, str],
        report: Callable[..., None],
    ) -> None:
        self.case, self.device, self.skip, self.report = case, device, skip, report
        started = time.time()
        self.until, self.last_start = until, started + WARM_SHARE * (until - started)
        report(doing="inputs")
        self.inputs = make_inputs(case.inputs, sizes, device)
        self.bound = self.inputs.bound(case.gradients, case.masked)
        self.measure = meter(device)
        self.calls: dict[str, Call] = {}

    def run(self, repeats: int) -> dict[str, Any]:
        rows = [self.first(each) for each in self.case.implementations]
        bound_seconds = []
        self.measure(self.bound.call)
        for _ in range(repeats):
            self.report(doing="bound")
            bound_seconds.append(self.measure(self.bound.call).seconds)
            for each, row in zip(self.case.implementations, rows, strict=True):
                if row.name in self.calls and not self._enough(row):
                    self.again(each, row)
        self.calls.clear()
        rate = self.bound.done / median(bound_seconds)
        bound = {"name": self.bound.name, "unit": self.bound.unit, "rate": rate}
        return {"bound": {**bound, "needed": self.bound.needed}, "rows": [asdict(r) for r in rows]}

    def first(self, each: Implementation) -> Row:
        """Make the call that compiles and warms up, and compare its results with the exact ones."""
        row = Row(each.name, each.computes, self.skip.get(each.name, ""))
        if each.gpu_only and self.device.type != "cuda":
            row.not_run = "runs on a GPU only"
        elif not row.not_run and time.time() > self.last_start:
            row.not_run = TOO_LATE
        if row.not_run:
            return row

        def step() -> None:
            call = each.make(self.inputs)
            row.errors = self.inputs.errors(call())
            self.calls[each.name] = call

        self._guarded(step, row)
        self._clean_up(each, row, thoroughly=True)
        return row

    def again(self, each: Implementation, row: Row) -> None:
        def step() -> None:
            sample = self.measure(self.calls[each.name])
            row.seconds.append(sample.seconds)
            if sample.extra_bytes is not None:
                row.extra_bytes = max(row.extra_bytes or 0, sample.extra_bytes)

        succeeded = self._guarded(step, row)
        self._clean_up(each, row, thoroughly=not succeeded)
        if not succeeded:
            del self.calls[each.name]

    def _guarded(self, step: Callable[[], None], row: Row) -> bool:
        """Return whether `step` succeeded; an exception becomes the row's reason."""
        self.report(doing=row.name)
        try:
            step()
        except Exception as error:
            if not row.seconds:
                row.not_run = why(error)
            return False
        return True

    def _clean_up(self, each: Implementation, row: Row, thoroughly: bool) -> None:
        try:
            if each.overwrites:
                self.inputs.restore()
            if thoroughly:
                self.measure.settle()
        except RuntimeError as error:
            raise Broken(row.not_run or why(error)) from error

    def _enough(self, row: Row) -> bool:
        late = time.time() > self.until
        return bool(row.seconds) and (late or sum(row.seconds) > ENOUGH_SECONDS[self.device.type])
