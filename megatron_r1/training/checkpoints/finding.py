"""The checkpoints of a run's folder: which there are, which is used, which are deleted.

step_00000012            whole: it got this name when every file of it was on disk
.step_00000016.partial   was being written when the run was killed; removed at the next start
step_00000008.damaged    found damaged and set aside for a person to look at; never deleted
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.files import fsync
from megatron_r1.training.checkpoints import manifest
from megatron_r1.training.checkpoints.manifest import Verify

STATE_FILE = "run_state.json"
"""The controller's state; what makes a folder a run's checkpoint."""

_NAME = re.compile(r"step_\d{8,}")
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that is not what was written. faults: a line per file."""

    folder: Path
    faults: tuple[str, ...]

    def __str__(self) -> str:
        more = len(self.faults) - SHOWN_FAULTS
        shown = "; ".join(self.faults[:SHOWN_FAULTS])
        return f"{self.folder.name}: {shown}" + (f"; and {more} more" if more > 0 else "")


def path_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def partial_of(folder: Path) -> Path:
    """Where `folder` is written before it has its name."""
    return folder.with_name(f".{folder.name}.partial")


def whole(checkpoints: Path) -> list[Path]:
    """Every checkpoint that got its name, in order of steps, undamaged or not."""
    if not checkpoints.is_dir():
        return []
    found = [f for f in checkpoints.iterdir() if _NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=step_of)


def newest(
    checkpoints: Path, verify: Verify, below: Path | None = None
) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint that can be used, and the damaged ones that are newer.

    below: older than this one only. Looks at names, sizes and the manifest ("none": at nothing but
    the names): checksums are the trainer ranks' work. None where no good one is left.
    """
    damaged: list[Damaged] = []
    for folder in reversed(whole(checkpoints)):
        if below is not None and step_of(folder) >= step_of(below):
            continue
        found = faults(folder, verify)
        if not found:
            return folder, damaged
        damaged.append(Damaged(folder, tuple(found)))
    return None, damaged


def refuse_without_good(checkpoints: Path, damaged: list[Damaged]) -> None:
    """Raises ValueError where `damaged`, or what was set aside before, is all there is.

    Starting over would overwrite the metrics of a run that a copy of its checkpoint may yet save.
    """
    before = sorted(f.name for f in checkpoints.glob("step_*.damaged*"))
    if not damaged and not before:
        return
    found = [str(one) for one in damaged] + [f"{name}: set aside earlier" for name in before]
    raise ValueError(
        "\n  ".join([f"{checkpoints} has no checkpoint left that can be used:", *found])
        + "\nPut a good copy of one there and run the same command again, or start anew in another "
        "run.folder. To load one as it is, rename it to step_… and set checkpoint.verify to none"
    )


def set_aside(damaged: Damaged) -> Path:
    """Rename a damaged checkpoint so that no run takes it; returns its new place."""
    target = damaged.folder.with_name(f"{damaged.folder.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = damaged.folder.with_name(f"{damaged.folder.name}.damaged_{number}")
    damaged.folder.rename(target)
    fsync(target.parent)
    return target


def remove_partial(checkpoints: Path) -> list[str]:
    """Delete what a kill left half-written, or half-deleted; the names of the former."""
    for doomed in checkpoints.glob(".*.deleted"):
        shutil.rmtree(doomed)
    leftovers = sorted(checkpoints.glob(".*.partial"))
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name.removeprefix(".").removesuffix(".partial") for leftover in leftovers]


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest good ones; a damaged one does not count, and stays."""
    good = [folder for folder in whole(checkpoints) if not faults(folder, "size")]
    for old in good[:-keep]:
        # A kill in between must not leave half a folder under a good name.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.deleted")))


def faults(folder: Path, verify: Verify) -> list[str]:
    """What is wrong with a checkpoint that can be seen without reading it, a line per file."""
    found = manifest.damage(folder, "none" if verify == "none" else "size")
    # The controller's state is needed before any rank can verify it, and small.
    found = found or manifest.damage(folder, verify, only=[STATE_FILE])
    if not found:
        try:
            json.loads((folder / STATE_FILE).read_bytes())
        except (OSError, ValueError) as error:
            found = [f"{STATE_FILE} cannot be read ({error})"]
    return found
