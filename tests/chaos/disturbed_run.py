"""A whole run under injected faults, compared with undisturbed runs of the same recipe.

A seeded schedule kills and stops engines, trainer ranks and the controller, drops connections,
fills the disk and corrupts a checkpoint. The same command is started again whenever it ends.
Checked at the end: every step is recorded once, no finished sample is lost, and held-out accuracy
is that of undisturbed runs."""

import argparse
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos import oracle
from tests.chaos.faults import FAULTS, possible, small_disk
from tests.chaos.user import User

DISK_MEBIBYTES = 96
STDERR_CHARS = 600
OVERLAP = 0.15
"""Probability that the next fault does not wait for the run to recover."""
LATEST_RECOVERY_SECONDS = 420.0


@dataclass
class Report:
    """One fault.

    Attributes:
        step: the last finished step when it was injected.
        seconds_to_next_step: from its beginning until a later step was finished."""

    fault: str
    step: int
    at_seconds: float
    what: str
    seconds_to_next_step: float | None = None


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seed", type=int, default=0, help="of the faults and of the run")
    options.add_argument("--staleness", type=int, default=0, help="rl.staleness of all runs")
    options.add_argument("--gap", type=int, nargs=2, default=(3, 8), help="steps between faults")
    options.add_argument("--undisturbed", type=int, default=2, help="runs to compare with")
    options.add_argument("--only", action="append", choices=list(FAULTS), help="repeatable")
    options.add_argument("--keep", type=Path, help="an empty folder that keeps everything")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return a report per fault, and "broken": the checks that failed."""
    names, skipped = possible()
    if chosen.only:
        names = [name for name in names if name in chosen.only]
    for name, reason in skipped.items():
        print(f"SKIPPED  {name}: {reason}")
    with tempfile.TemporaryDirectory(prefix="chaos") as scratch:
        folder = (chosen.keep or Path(scratch)).resolve()
        base = oracle.make_base(folder / "model", chosen.seed)
        folders = [folder / f"undisturbed_{i}" for i in range(chosen.undisturbed)]
        undisturbed = [_undisturbed(each, base, chosen) for each in folders]
        with small_disk(folder / "disk", DISK_MEBIBYTES) as disk:
            try:
                user, reports = _disturbed(disk, folder / "commands", base, names, chosen)
            finally:
                if chosen.keep and (disk / "run").exists():
                    shutil.copytree(disk / "run", folder / "run")
            result = _result(user, reports, disk / "run", undisturbed, chosen)
    return {"skipped": skipped, **result}


def _command(folder: Path, base: Path, chosen: argparse.Namespace) -> list[str]:
    """Write what a run in `folder`/run needs; return its command."""
    questions = oracle.write_questions(folder / "questions.jsonl")
    run = folder / "run"
    return oracle.command(base, run, questions, chosen.steps, chosen.seed, chosen.staleness)


def _undisturbed(folder: Path, base: Path, chosen: argparse.Namespace) -> Path:
    folder.mkdir(parents=True)
    user = User(_command(folder, base, chosen), folder / "run", folder / "commands")
    try:
        while not user.is_done:
            user.follow(1.0)
    finally:
        user.close()
    accuracy = oracle.accuracy(user.run)
    print(f"undisturbed: accuracy {accuracy:.3f} in {user.seconds:.0f} s", flush=True)
    return user.run


def _disturbed(
    disk: Path, logs: Path, base: Path, names: list[str], chosen: argparse.Namespace
) -> tuple[User, list[Report]]:
    user = User(_command(disk, base, chosen), disk / "run", logs)
    draw = random.Random(chosen.seed)
    try:
        return user, disturb(user, names, chosen.steps, chosen.gap, draw)
    finally:
        user.close()


def order(names: list[str], draw: random.Random) -> Iterator[str]:
    """Yield all names in random order, then all in another order, without end."""
    while True:
        yield from draw.sample(names, len(names))


def disturb(
    user: User,
    names: list[str],
    steps: int,
    gap: tuple[int, int],
    draw: random.Random,
) -> list[Report]:
    """Inject faults until the run is done. gap: steps between a recovery and the next fault."""
    reports, faults = [], order(names, draw)
    _until(user, 1)
    num_reported, wait = 0, draw.randint(1, gap[0])
    while not user.is_done:
        due = user.best + wait
        _until(user, min(due, steps - 1))
        if user.best >= steps - 1:
            break
        user.follow(draw.uniform(0.0, 1.5))  # into any phase of a step
        reports.append(_inject(user, next(faults), draw))
        if draw.random() < OVERLAP and user.best < steps - 1:
            user.follow(draw.uniform(0.0, 20.0))
            reports.append(_inject(user, next(faults), draw))
        _until(user, reports[-1].step + 1)
        for report in reports[num_reported:]:
            later = [seen.seconds for seen in user.sightings if seen.line["step"] > report.step]
            if later:  # empty if the fault came in the run's last step or after it
                report.seconds_to_next_step = round(later[0] - report.at_seconds, 2)
            seconds = report.seconds_to_next_step
            took = "    the end" if seconds is None else f"{seconds:9.1f} s"
            what = report.what.splitlines()[-1][:120]
            print(f"step {report.step:4}  {report.fault:36}{took}  {what}", flush=True)
        num_reported, wait = len(reports), draw.randint(*gap)
    _until(user)
    return reports


def _inject(user: User, name: str, draw: random.Random) -> Report:
    """Inject the fault as soon as its target exists; raise RuntimeError if it never does."""
    deadline = user.seconds + LATEST_RECOVERY_SECONDS
    while user.seconds < deadline:
        seconds = user.seconds
        what = FAULTS[name](user, draw) if user.is_running else None
        if what or user.is_done:
            return Report(name, user.best, round(seconds, 2), what or "came too late")
        user.follow(0.02)
    raise RuntimeError(f"no target for this fault after step {user.best}: {name}")


def _until(user: User, step: float = math.inf) -> None:
    """Follow the run until it has finished a step, or is done."""
    deadline = user.seconds + LATEST_RECOVERY_SECONDS
    while user.best < step and not user.is_done:
        user.follow(0.1)
        if user.seconds > deadline:
            raise RuntimeError(f"stuck after step {user.best} for {LATEST_RECOVERY_SECONDS:.0f} s")


def _result(
    user: User, reports: list[Report], run: Path, undisturbed: list[Path], chosen: Any
) -> dict[str, Any]:
    broken = [
        *oracle.steps_once(run, chosen.steps, chosen.staleness),
        *oracle.samples_once(run, undisturbed[0], chosen.steps),
        *oracle.evaluated_once(run, undisturbed[0]),
        *oracle.nothing_lost(user),
        *oracle.as_accurate(run, undisturbed),
    ]
    mean, allowed = oracle.allowed_gap(undisturbed)
    again = len(user.sightings) - chosen.steps
    said = [end.stderr[-STDERR_CHARS:].replace(str(run), "RUN") for end in user.ends]
    result = {
        "steps": chosen.steps,
        "seed": chosen.seed,
        "staleness": chosen.staleness,
        "seconds": round(user.seconds),
        "commands": len(user.ends),
        "faults": dict(Counter(report.fault for report in reports)),
        "steps_done_again": again,
        "accuracy": oracle.accuracy(run),
        "accuracy_undisturbed": [oracle.accuracy(folder) for folder in undisturbed],
        "accuracy_allowed_gap": allowed,
        "broken": broken,
        "ends": [
            {"at_seconds": round(end.seconds), "status": end.status, "said": text}
            for end, text in zip(user.ends, said, strict=True)
        ],
        "reports": [asdict(report) for report in reports],
    }
    print(
        f"{chosen.steps} steps, {len(reports)} faults, {len(user.ends)} commands, {again} steps "
        f"done again, {user.seconds:.0f} s; accuracy {result['accuracy']:.3f}, undisturbed "
        f"{mean:.3f} (may differ by {allowed:.3f})"
    )
    for violation in broken:
        print(f"BROKEN  {violation}")
    return result
