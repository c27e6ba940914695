"""`model.checkpoint`: the folder that training takes its first weights from, looked at before any
rank starts. Pure Python; the ranks verify its checksums when they load it."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.training.checkpoints import finding, manifest


def check_folder(folder: Path) -> str | None:
    """Raise ValueError unless `folder` is a Megatron checkpoint.

    Returns a line for the person where nothing says what its bytes were: a checkpoint that was
    made elsewhere has no manifest.
    """
    if (folder / "metadata.json").is_file():
        if has_manifest(folder):
            return None
        return f"model.checkpoint {folder} has no {manifest.NAME}: its checksums cannot be verified"
    found = finding.whole(folder / "checkpoints") or finding.whole(folder)
    if found:
        raise ValueError(
            f"model.checkpoint: {folder} holds several checkpoints; use one of them, the newest is "
            f"{found[-1]}"
        )
    what = "has no metadata.json" if folder.exists() else "does not exist"
    raise ValueError(
        f"model.checkpoint: {folder} {what}; give the folder of a Megatron checkpoint, such as "
        "RUN/checkpoints/step_00000012 or what tools/convert from-hf makes"
    )


def has_manifest(folder: Path) -> bool:
    """Whether there is anything to compare the checkpoint's files with."""
    return (folder / manifest.NAME).is_file()
