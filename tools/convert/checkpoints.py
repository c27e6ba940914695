"""Which checkpoint a path on the command line means, and whether it is what was written.

Of a run the newest is meant. Where that one is damaged, nothing older is taken in its place: the
result would be another policy than the one asked for.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from sources import is_hf

from megatron_r1.training.checkpoints import finding, manifest
from megatron_r1.training.checkpoints.manifest import Verify


@dataclass(frozen=True)
class Found:
    """A checkpoint's folder; run: the run's, where that was given and not the checkpoint's own."""

    folder: Path
    run: Path | None


def find_checkpoint(path: Path) -> Found:
    """The checkpoint that `path` means: itself, or a run's newest, and then says which.

    Raises ValueError when it is neither.
    """
    if (path / "metadata.json").is_file():
        return Found(path, None)
    if is_hf(path):
        raise ValueError(f"{path} is a Hugging Face folder; a Megatron checkpoint is wanted here")
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        what = "has no metadata.json and no checkpoints/" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: give a checkpoint's folder or a run's folder")
    folders = finding.whole(checkpoints)
    if not folders:
        aside = ", ".join(sorted(f.name for f in checkpoints.glob("step_*.damaged*")))
        raise ValueError(
            f"{checkpoints} has no checkpoint that a run would use"
            + (f", only {aside}; give one's folder to take it as it is" if aside else " yet")
        )
    newest = folders[-1]
    print(f"{path}: step {finding.step_of(newest)}, its newest ({newest})", flush=True)
    for aside in sorted(checkpoints.glob("step_*.damaged*")):
        if aside.name.split(".")[0] > newest.name:
            print(f"  newer, but set aside as damaged: {aside.name}", flush=True)
    return Found(newest, path)


def check_manifest(found: Found, how: Verify, chosen: Namespace) -> None:
    """Raise ValueError naming the files that are not what was written, and what can be done.

    chosen: the command line. Of a run's newest the manifest must be there. A checkpoint that was
    given itself may come from elsewhere, without one.
    """
    if found.run is None and not (found.folder / manifest.NAME).is_file():
        return
    faults = manifest.damage(found.folder, how)
    if not faults:
        return
    damaged = f"{found.folder} is damaged: {'; '.join(faults[:5])}"
    if found.run is None:
        raise ValueError(
            f"{damaged}; convert another checkpoint, or this one as it is with --checksums none"
        )
    older = _older(found, how)
    if older is None:
        raise ValueError(f"{damaged}; {found.run} has no older one that is undamaged")
    raise ValueError(
        f"{damaged}\nThe newest undamaged one is older, of step {finding.step_of(older)}. "
        f"To take that one:\n  {_command(chosen, found.run, older)}"
    )


def _older(found: Found, how: Verify) -> Path | None:
    """The newest undamaged checkpoint of the run before `found`."""
    before = finding.whole(found.folder.parent)[::-1]
    limit = finding.step_of(found.folder)
    good = (f for f in before if finding.step_of(f) < limit and not manifest.damage(f, how))
    return next(good, None)


def _command(chosen: Namespace, run: Path, checkpoint: Path) -> str:
    """The command line again, with `checkpoint` where `run` was."""
    words = [str(checkpoint) if Path(word) == run else word for word in chosen.arguments]
    return shlex.join(["python", "tools/convert", *words])
