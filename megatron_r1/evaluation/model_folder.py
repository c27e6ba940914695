"""The model folder that a path names, and whether its weights are whole."""

from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    require_complete,
    weight_files,
)
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, complete_checkpoints


def find_model(path: str) -> tuple[Path, bool]:
    """Return (a Hugging Face folder, False) or (a checkpoint that must be exported first, True).

    Args:
        path: a Hugging Face folder; a run's folder, whose `hf/` is used unless a checkpoint is
            newer; or one checkpoint of a run.

    Raises:
        UserError: anything else."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder, False
    if (folder / STATE_FILE).is_file():
        return folder, True
    if has_newest_export(folder):
        return folder / "hf", False
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if checkpoints:
        return checkpoints[-1], True
    raise UserError(
        f"model.path {path}: neither a Hugging Face folder (no config.json) nor a run's folder "
        "(no hf/ and no checkpoints/)",
        key="model.path",
        cause=Cause.NOT_FOUND,
    )


def has_newest_export(run: Path) -> bool:
    """Return whether a run has an `hf/` that is no older than its newest checkpoint."""
    exported = run / "hf" / "config.json"
    checkpoints = complete_checkpoints(run / "checkpoints")
    return exported.is_file() and (
        not checkpoints or exported.stat().st_mtime >= checkpoints[-1].stat().st_mtime
    )


def require_weights(folder: Path, key: str = "model.path") -> None:
    """Raise UserError for a model folder without whole weights that an engine can load.

    Args:
        folder: the model's folder.
        key: the key that names it, for errors.
    """
    has_safetensors = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    if not has_safetensors and any(folder.glob("*.bin")):
        return  # the format before safetensors, which engines still read
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}", key=key, cause=error.cause) from None
    require_complete(folder)
