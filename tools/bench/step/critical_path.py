"""Divides the wall-clock time of a run's steps among the processes that were busy.

From the spans that a run's processes record (`base.processes.timeline`), for the time in which the
controller waited and the rest."""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from megatron_r1.base.processes.timeline import CPU_KIND, IDLE_SPAN, STEP_KIND

NOBODY = "nobody is busy: messages on their way, or cores taken by others"
WORKERS = ("core", "server", "trainer", "controller")
FIRST_ROLES = {"train": ("trainer", "core"), "push": ("trainer", "core")}
"""Who is looked at first in a phase, where two are busy at once; in others the engine's core."""


class Span(NamedTuple):
    """A span of one process.

    Attributes:
        name: "role/what".
        start: seconds on CLOCK_MONOTONIC.
        end: seconds on CLOCK_MONOTONIC."""

    name: str
    start: float
    end: float

    @property
    def role(self) -> str:
        return self.name.partition("/")[0]


@dataclass
class ProcessSpans:
    """The records of one process.

    Attributes:
        spans: the spans that the process recorded.
        cpu: (time, seconds of its processor time until then)."""

    spans: list[Span] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)

    @property
    def role(self) -> str:
        roles = Counter(span.role for span in self.spans if span.role in WORKERS)
        return max(roles, key=lambda role: roles[role], default="other")


def read_processes(folder: Path) -> list[ProcessSpans]:
    """Return the processes whose files are in `folder`. Exits where there is none."""
    processes = []
    for path in sorted(folder.glob("*.jsonl")):
        process = ProcessSpans()
        for line in path.read_text(encoding="utf-8").splitlines():
            name, *values = json.loads(line)
            if name == CPU_KIND:
                process.cpu.append((values[0], values[1]))
            else:
                process.spans.append(Span(name, *values))
        processes.append(process)
    if not processes:
        raise SystemExit(
            f"{folder} has no timeline: run with --profile, or set MEGATRON_R1_TIMELINE"
        )
    return processes


def steps(processes: Iterable[ProcessSpans]) -> list[tuple[float, float]]:
    """Return (begin, end) of every step but the first, which includes warming up, and the last,
    whose end is not marked."""
    marks = sorted(s.start for p in processes for s in p.spans if s.role == STEP_KIND)
    return list(pairwise(marks[1:]))


def divide_time(
    processes: list[ProcessSpans], begin: float, end: float
) -> dict[tuple[str, str], float]:
    """Return the seconds of [begin, end] by (phase of the loop, who was busy with what). The values
    sum to end - begin: where several were busy, the first of `WORKERS` has the time, or of
    `FIRST_ROLES` in that phase.

    Args:
        processes: all processes of the run.
        begin: seconds on CLOCK_MONOTONIC.
        end: seconds on CLOCK_MONOTONIC."""
    lines = [_Line(process, begin, end) for process in processes]
    cuts = sorted({begin, end, *(time for line in lines for time in line.times)})
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for start, stop in pairwise(cuts):
        span_by_role: dict[str, str] = {}
        phase = "between"
        for line in lines:
            doing, at_phase = line.at((start + stop) / 2)
            phase = at_phase or phase
            if doing:
                span_by_role.setdefault(doing.partition("/")[0], doing)
        order = [*FIRST_ROLES.get(phase, ()), *WORKERS]
        activity = next((span_by_role[role] for role in order if role in span_by_role), NOBODY)
        seconds[phase, activity] += stop - start
    return seconds


def busy_seconds(process: ProcessSpans, begin: float, end: float) -> float:
    """Return the seconds of [begin, end] in which the process was in a span of work.

    Args:
        process: the records of the process.
        begin: seconds on CLOCK_MONOTONIC.
        end: seconds on CLOCK_MONOTONIC."""
    line = _Line(process, begin, end)
    cuts = sorted({begin, end, *line.times})
    parts = pairwise(cuts)
    return sum(stop - start for start, stop in parts if line.at((start + stop) / 2)[0])


def cpu_seconds(process: ProcessSpans, begin: float, end: float) -> float:
    """Return the process's processor time in [begin, end], between its nearest records.

    Args:
        process: the records of the process.
        begin: seconds on CLOCK_MONOTONIC.
        end: seconds on CLOCK_MONOTONIC."""
    times = [time for time, _ in process.cpu]

    def at(time: float) -> float:
        i = bisect_right(times, time)
        if i in (0, len(times)):
            return process.cpu[min(i, len(times) - 1)][1] if times else 0.0
        (t0, c0), (t1, c1) = process.cpu[i - 1 : i + 1]
        return c0 + (c1 - c0) * (time - t0) / (t1 - t0)

    return at(end) - at(begin)


class _Line:
    """A process in one interval: what it does at a time."""

    def __init__(self, process: ProcessSpans, begin: float, end: float):
        spans = [span for span in process.spans if span.end > begin and span.start < end]
        # The one that began last is the innermost; spans are short, so it is found by looking back.
        self._spans = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in self._spans]
        self._longest = max((span.end - span.start for span in spans), default=0.0)
        self._is_controller = any(span.name == IDLE_SPAN for span in process.spans)
        times = (time for span in spans for time in (span.start, span.end))
        self.times = {time for time in times if begin < time < end}

    def at(self, time: float) -> tuple[str, str]:
        """Return (the innermost span of work, the phase), each "" where there is none."""
        doing = phase = ""
        waits = False
        for i in range(bisect_right(self._starts, time) - 1, -1, -1):
            span = self._spans[i]
            if span.start < time - self._longest or (phase and doing):
                break
            if span.end <= time:
                continue
            if span.role == "phase":
                phase = phase or span.name.partition("/")[2]
            elif span.name == IDLE_SPAN:  # of the event loop; a thread may work meanwhile
                waits = True
            else:
                doing = doing or span.name
        if self._is_controller and not waits:
            doing = doing or "controller/event loop"
        return doing, phase


def profile(folder: Path) -> dict[str, Any]:
    """Return the means of all steps in a timeline: seconds of a step, their division, and each
    role's busy, waiting and processor seconds."""
    processes = read_processes(folder)
    measured = steps(processes)
    if not measured:
        raise SystemExit(f"{folder}: fewer than three steps are in the timeline")
    count = len(measured)
    total: dict[tuple[str, str], float] = defaultdict(float)
    roles: dict[str, dict[str, float]] = defaultdict(lambda: {"busy": 0.0, "cpu": 0.0, "number": 0})
    for begin, end in measured:
        for part, value in divide_time(processes, begin, end).items():
            total[part] += value / count
    for process in (candidate for candidate in processes if candidate.role in WORKERS):
        of = roles[process.role]
        of["number"] += 1
        of["busy"] += sum(busy_seconds(process, *step) for step in measured) / count
        of["cpu"] += cpu_seconds(process, measured[0][0], measured[-1][1]) / count
    seconds = sum(end - begin for begin, end in measured) / count
    path = [
        {"phase": phase, "busy": doing, "seconds": value}
        for (phase, doing), value in sorted(total.items(), key=lambda item: -item[1])
    ]
    return {
        "steps": count,
        "seconds": seconds,
        "median_seconds": median(end - begin for begin, end in measured),
        "path": path,
        "roles": {
            role: of | {"waiting": of["number"] * seconds - of["busy"]}
            for role, of in roles.items()
        },
    }


def table(profile: dict[str, Any], min_seconds: float = 0.002) -> str:
    """Return a profile as text.

    Args:
        profile: the profile.
        min_seconds: the share of a step below which shares are summed up by phase."""
    seconds = profile["seconds"]
    lines = [
        f"mean of {profile['steps']} steps, {1000 * seconds:.0f} ms each: "
        "who is busy, and so what the others wait for (sums to the step)"
    ]
    phases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in profile["path"]:
        phases[part["phase"]].append(part)
    sums = {phase: sum(part["seconds"] for part in parts) for phase, parts in phases.items()}
    for phase in sorted(sums, key=lambda phase: -sums[phase]):
        lines.append(_format_row(phase, sums[phase], seconds))
        small = 0.0
        for part in phases[phase]:
            if part["seconds"] < min_seconds * seconds:
                small += part["seconds"]
            else:
                lines.append(_format_row("  " + part["busy"], part["seconds"], seconds))
        lines.append(_format_row("  all else", small, seconds))
    lines.append(f"{'':48}{'busy':>9}{'waiting':>9}{'CPU':>9}   ms a step")
    for role, of in profile["roles"].items():
        name = role if of["number"] == 1 else f"{role}, {of['number']:.0f} processes"
        cells = (1000 * of[key] for key in ("busy", "waiting", "cpu"))
        lines.append(f"{name:48}" + "".join(f"{cell:9.1f}" for cell in cells))
    return "\n".join(lines)


def _format_row(name: str, seconds: float, total_seconds: float) -> str:
    return f"{name:66}{1000 * seconds:9.1f} ms{seconds / total_seconds:8.1%}"
