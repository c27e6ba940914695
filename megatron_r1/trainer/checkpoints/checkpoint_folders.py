"""The checkpoints in a folder: the one to continue from, those to set aside or delete, and the one
that `model.checkpoint` names. A `manifest` tells a good one from a damaged one. No torch.

    step_00000012            whole: renamed to this when every file of it was on disk
    .step_00000016.partial   being written when the run was killed; removed at the next start
    step_00000008.damaged    found damaged and set aside for the user to inspect; never deleted"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import fsync
from megatron_r1.trainer.checkpoints.manifest import MANIFEST, Verify, manifest_faults

STATE_FILE = "run_state.json"
"""The controller's state; a folder without it is not a run's checkpoint."""

_STEP_NAME = re.compile(r"step_\d{8,}")
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that differs from what was written.

    Attributes:
        folder: the checkpoint's folder.
        faults: a line per damaged file."""

    folder: Path
    faults: tuple[str, ...]

    def __str__(self) -> str:
        num_more = len(self.faults) - SHOWN_FAULTS
        listing = "; ".join(self.faults[:SHOWN_FAULTS])
        return f"{self.folder.name}: {listing}" + (f"; and {num_more} more" if num_more > 0 else "")


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step`: step_00000012."""
    return checkpoints / f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step after which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step_"))


def partial_path(folder: Path) -> Path:
    """Return the path under which `folder` is written before it is renamed."""
    return folder.with_name(f".{folder.name}.partial")


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return every completely written checkpoint, damaged ones included, in order of steps."""
    if not checkpoints.is_dir():
        return []
    folders = [f for f in checkpoints.iterdir() if _STEP_NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(folders, key=checkpoint_step)


def newest_usable(
    checkpoints: Path, verify: Verify, limit: Path | None = None
) -> tuple[Path | None, list[DamagedCheckpoint]]:
    """Return the newest checkpoint that can be used (None if none is good), and the damaged ones
    that are newer.

    The trainer ranks verify the checksums.

    Args:
        checkpoints: the folder of the run's checkpoints.
        verify: what is compared: names, sizes and the manifest; for "none" names only.
        limit: a checkpoint; only older ones are considered. None: all are."""
    damaged_checkpoints: list[DamagedCheckpoint] = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if limit is not None and checkpoint_step(folder) >= checkpoint_step(limit):
            continue
        if not (faults := find_faults(folder, verify)):
            return folder, damaged_checkpoints
        damaged_checkpoints.append(DamagedCheckpoint(folder, tuple(faults)))
    return None, damaged_checkpoints


def require_usable(checkpoints: Path, damaged: list[DamagedCheckpoint]) -> None:
    """Raise UserError where all checkpoints are `damaged` or were set aside before.

    Starting over would overwrite the metrics of a run that a copy of its checkpoint may yet save.
    """
    earlier_names = sorted(f.name for f in checkpoints.glob("step_*.damaged*"))
    if not damaged and not earlier_names:
        return
    lines = [str(checkpoint) for checkpoint in damaged] + [
        f"{name}: set aside earlier" for name in earlier_names
    ]
    raise UserError(
        "\n  ".join([f"{checkpoints} has no checkpoint left that can be used:", *lines])
        + "\nPut a good copy of one there and run the same command again, or start anew in another "
        "run.folder. To load one as it is, rename it to step_… and set checkpoint.verify to none",
        key="checkpoint",
        cause=Cause.EMPTY,
    )


def set_aside(damaged: DamagedCheckpoint) -> Path:
    """Rename a damaged checkpoint so that no run loads it; return its new path."""
    target = damaged.folder.with_name(f"{damaged.folder.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = damaged.folder.with_name(f"{damaged.folder.name}.damaged_{number}")
    damaged.folder.rename(target)
    fsync(target.parent)
    return target


def remove_partial(checkpoints: Path) -> list[str]:
    """Delete half-written and half-deleted checkpoints; return the names of the half-written."""
    for half_deleted in checkpoints.glob(".*.deleted"):
        shutil.rmtree(half_deleted)
    leftovers = sorted(checkpoints.glob(".*.partial"))
    for leftover_folder in leftovers:
        shutil.rmtree(leftover_folder)
    return [
        leftover_folder.name.removeprefix(".").removesuffix(".partial")
        for leftover_folder in leftovers
    ]


def prune(checkpoints: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the `keep` newest good checkpoints; damaged ones do not count, and stay.

    Args:
        checkpoints: the folder of the run's checkpoints.
        keep: how many of the newest stay.
        keep_every: those of steps that this divides stay, too; None: no others."""
    good_folders = [
        folder for folder in complete_checkpoints(checkpoints) if not find_faults(folder, "size")
    ]
    for old_folder in good_folders[:-keep]:
        if keep_every is not None and checkpoint_step(old_folder) % keep_every == 0:
            continue
        # A kill in between must not leave half a folder under a good name.
        shutil.rmtree(old_folder.rename(old_folder.with_name(f".{old_folder.name}.deleted")))


def find_faults(folder: Path, verify: Verify) -> list[str]:
    """Return the faults of a checkpoint that show without reading its tensors, a line per file."""
    by_size = manifest_faults(folder, "none" if verify == "none" else "size")
    # The controller reads its state before any rank can verify it, and the file is small.
    if lines := by_size or manifest_faults(folder, verify, only=[STATE_FILE]):
        return lines
    try:
        json.loads((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        return [f"{STATE_FILE} cannot be read ({error})"]
    return []


def verify_initial_checkpoint(folder: Path) -> str | None:
    """Raise UserError unless `folder`, of `model.checkpoint`, is a Megatron checkpoint.

    Checked before any rank starts; the ranks verify the checksums when they load it. Returns a note
    for the user where there is no manifest to verify against: the checkpoint was made elsewhere."""
    if (folder / "metadata.json").is_file():
        if (folder / MANIFEST).is_file():
            return None
        return f"model.checkpoint {folder} has no {MANIFEST}: its checksums cannot be verified"
    if run_checkpoints := complete_checkpoints(folder / "checkpoints") or complete_checkpoints(
        folder
    ):
        raise UserError(
            f"model.checkpoint: {folder} holds several checkpoints; use one of them, the newest is "
            f"{run_checkpoints[-1]}",
            key="model.checkpoint",
            cause=Cause.CONFLICT,
        )
    fault = "has no metadata.json" if folder.exists() else "does not exist"
    raise UserError(
        f"model.checkpoint: {folder} {fault}; give the folder of a Megatron checkpoint, such as "
        "RUN/checkpoints/step_00000012 or what megatron-r1 convert from-hf makes",
        key="model.checkpoint",
        cause=Cause.NOT_FOUND,
    )
