"""A whole run while things break: engines, trainer ranks and the controller are killed and stopped,
connections dropped, the disk filled, a checkpoint corrupted, by a seeded list. The same command is
typed again whenever it ends. Then: is every step there once, is no finished sample lost, is the
model as good as that of the same recipe left in peace?
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from . import oracle, task
from .disk import small_disk
from .faults import FAULTS, Scene, possible
from .schedule import Report, as_dicts, disturb
from .user import End, User

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
DISK_MEBIBYTES = 96
SAID_CHARS = 600


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seed", type=int, default=0, help="of the faults and of the run")
    options.add_argument("--staleness", type=int, default=0, help="rl.staleness of all runs")
    options.add_argument("--gap", type=int, nargs=2, default=(3, 8), help="steps between faults")
    options.add_argument("--undisturbed", type=int, default=2, help="runs to compare with")
    options.add_argument("--only", action="append", choices=list(FAULTS), help="repeatable")
    options.add_argument("--keep", type=Path, help="an empty folder that everything stays in")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """A report per fault, and "broken": what does not hold."""
    names, skipped = possible()
    if chosen.only:
        names = [name for name in names if name in chosen.only]
    for name, reason in skipped.items():
        print(f"SKIPPED  {name}: {reason}")
    with tempfile.TemporaryDirectory(prefix="chaos") as scratch:
        folder = (chosen.keep or Path(scratch)).resolve()
        base = task.make_base(folder / "model", chosen.seed)
        undisturbed = [
            _left_in_peace(folder / f"undisturbed_{i}", base, chosen)
            for i in range(chosen.undisturbed)
        ]
        with small_disk(folder / "disk", DISK_MEBIBYTES) as disk:
            try:
                user, reports = _disturbed(disk, folder / "commands", base, names, chosen)
            finally:
                if chosen.keep and (disk / "run").exists():
                    shutil.copytree(disk / "run", folder / "run")
            result = _judged(user, reports, disk / "run", undisturbed, chosen)
    return {"skipped": skipped, **result}


def _recipe(folder: Path, base: Path, chosen: argparse.Namespace) -> list[str]:
    """The command of a run in `folder`/run."""
    questions = task.write_questions(folder / "questions.jsonl")
    settings = task.recipe(base, folder / "run", questions, chosen.steps, chosen.seed)
    if chosen.staleness:
        settings["rl"] |= {"staleness": chosen.staleness, "importance_cap": 2.0}
    return task.command("rl", task.write_recipe(folder / "recipe.yaml", settings))


def _left_in_peace(folder: Path, base: Path, chosen: argparse.Namespace) -> Path:
    folder.mkdir(parents=True)
    user = User(_recipe(folder, base, chosen), folder / "run", folder / "commands", ENVIRONMENT)
    try:
        while not user.is_done:
            user.follow(1.0)
    finally:
        user.close()
    print(
        f"undisturbed: accuracy {oracle.accuracy(user.run):.3f} in {user.seconds:.0f} s", flush=True
    )
    return user.run


def _disturbed(
    disk: Path, logs: Path, base: Path, names: list[str], chosen: argparse.Namespace
) -> tuple[User, list[Report]]:
    user = User(_recipe(disk, base, chosen), disk / "run", logs, ENVIRONMENT)
    draw = random.Random(chosen.seed)
    try:
        reports = disturb(Scene(user, disk), names, chosen.steps, tuple(chosen.gap), draw, _tell)
    finally:
        user.close()
    return user, reports


def _tell(report: Report) -> None:
    seconds = report.seconds_to_next_step
    took = "    the end" if seconds is None else f"{seconds:9.1f} s"
    what = report.what.splitlines()[-1][:120]
    print(f"step {report.step:4}  {report.fault:36}{took}  {what}", flush=True)


def _told(end: End, run: Path) -> dict[str, Any]:
    """How a command ended, without the names of folders that are gone."""
    said = end.said[-SAID_CHARS:].replace(str(run), "RUN")
    return {"at_seconds": round(end.seconds), "status": end.status, "said": said}


def _judged(
    user: User, reports: list[Report], run: Path, undisturbed: list[Path], chosen
) -> dict[str, Any]:
    broken = oracle.all_wrong(user, run, undisturbed, chosen.steps, chosen.staleness)
    mean, allowed = oracle.allowed_gap(undisturbed)
    again = len(user.sightings) - chosen.steps
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
        "ends": [_told(end, run) for end in user.ends],
        "reports": as_dicts(reports),
    }
    print(
        f"{chosen.steps} steps, {len(reports)} faults, {len(user.ends)} commands, {again} steps "
        f"done again, {user.seconds:.0f} s; accuracy {result['accuracy']:.3f}, undisturbed "
        f"{mean:.3f} (may differ by {allowed:.3f})"
    )
    for wrong in broken:
        print(f"BROKEN  {wrong}")
    return result
