"""The models that a command line names: checkpoint, configuration, weights, and a fingerprint.

A run's folder names its newest checkpoint. If that one is damaged, no older one takes its place:
the result would be another policy than the requested one."""

import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.support_checks import check_supported
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.table import SCORE
from megatron_r1.trainer.checkpoints import checkpoint_folders, manifest
from megatron_r1.trainer.checkpoints.manifest import Verify

Weights = HFWeights | MegatronWeights
HF_FILES = "huggingface"
"""Subfolder of a converted checkpoint with config.json, tokenizer and FP8 scales of its source."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint's folder.

    Attributes:
        folder: the folder of the step.
        run: the run's folder if the command named that, else None."""

    folder: Path
    run: Path | None


def is_hf(path: Path) -> bool:
    """Return whether `path` holds a model in Hugging Face's format."""
    return (path / "config.json").is_file()


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """Return the checkpoint `path`, or the newest one of the run `path`, whose step is printed.

    Raises:
        UserError: the path is neither.
    """
    if (path / "metadata.json").is_file():
        return FoundCheckpoint(path, None)
    if is_hf(path):
        raise UserError(
            f"{path} is a Hugging Face folder; give a Megatron checkpoint",
            key="checkpoint",
            cause=Cause.CONFLICT,
        )
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        fault = "has no metadata.json and no checkpoints/" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {fault}: give a checkpoint's folder or a run's folder",
            key="checkpoint",
            cause=Cause.NOT_FOUND,
        )
    folders = checkpoint_folders.complete_checkpoints(checkpoints)
    damaged = sorted(checkpoints.glob("step_*.damaged*"))
    if not folders:
        aside = ", ".join(folder.name for folder in damaged)
        raise UserError(
            f"{checkpoints} has no checkpoint that a run would use"
            + (f", only {aside}; give one's folder to take it as it is" if aside else " yet"),
            key="checkpoint",
            cause=Cause.EMPTY,
        )
    newest = folders[-1]
    print(
        f"{path}: step {checkpoint_folders.checkpoint_step(newest)}, its newest ({newest})",
        flush=True,
    )
    for folder in damaged:
        if folder.name.split(".")[0] > newest.name:
            print(f"  newer, but set aside as damaged: {folder.name}", flush=True)
    return FoundCheckpoint(newest, path)


def check_manifest(checkpoint: FoundCheckpoint, verify: Verify, args: Namespace) -> None:
    """Check the files of a checkpoint against its manifest.

    A run's newest checkpoint must have its manifest; a checkpoint that the command names itself may
    come from elsewhere, without one.

    Args:
        checkpoint: its folder, and that of its run if the command names a run.
        verify: what is compared.
        args: the command line.

    Raises:
        UserError: with the damaged files and the remedy."""
    if checkpoint.run is None and not (checkpoint.folder / manifest.MANIFEST).is_file():
        return
    faults = manifest.manifest_faults(checkpoint.folder, verify)
    if not faults:
        return
    damaged = f"{checkpoint.folder} is damaged: {'; '.join(faults[:5])}"
    if checkpoint.run is None:
        raise UserError(
            f"{damaged}; convert another checkpoint, or this one as it is with --checksums none",
            key="checkpoint",
            cause=Cause.MALFORMED,
        )
    damaged_step = checkpoint_folders.checkpoint_step(checkpoint.folder)
    complete_folders = checkpoint_folders.complete_checkpoints(checkpoint.folder.parent)
    older_folders = (
        folder
        for folder in complete_folders[::-1]
        if checkpoint_folders.checkpoint_step(folder) < damaged_step
    )
    undamaged_folder = next(
        (folder for folder in older_folders if not manifest.manifest_faults(folder, verify)),
        None,
    )
    if undamaged_folder is None:
        raise UserError(
            f"{damaged}; {checkpoint.run} has no older one that is undamaged",
            key="checkpoint",
            cause=Cause.MALFORMED,
        )
    words = [
        str(undamaged_folder) if Path(word) == checkpoint.run else word for word in args.arguments
    ]
    raise UserError(
        f"{damaged}\nThe newest undamaged one is older, of step "
        f"{checkpoint_folders.checkpoint_step(undamaged_folder)}. "
        f"To take that one:\n  {shlex.join(['megatron-r1', 'convert', *words])}",
        key="checkpoint",
        cause=Cause.MALFORMED,
    )


def read_supported_config(folder: Path, checkpoint: Path | None = None) -> HFConfig:
    """Return the config.json in `folder`.

    Args:
        folder: a Hugging Face folder.
        checkpoint: the model's. If that is a score model, so is the configuration, even if `folder`
            has the language model it was started from.

    Raises:
        UserError: the trainer does not support the model."""
    hf_config = read_config(folder, checkpoint)
    try:
        check_supported(hf_config)
    except UserError as error:
        raise UserError(
            f"{folder / 'config.json'}: {error}", key=error.key, cause=error.cause
        ) from error
    return hf_config


def read_config(folder: Path, checkpoint: Path | None = None) -> HFConfig:
    """Return the config.json as `read_supported_config` does, of any model."""
    scores = checkpoint is not None and SCORE in DistributedCheckpoint(checkpoint).shapes
    return read_hf_config(folder, "score" if scores else None)


def require_outside(out: Path, source: Path) -> None:
    """Raise UserError if `out` is inside the folder that is read."""
    if source.resolve() in (out.resolve(), *out.resolve().parents) and not out.exists():
        raise UserError(
            f"{out} is inside {source}, which is read: give an OUT next to it",
            key="out",
            cause=Cause.CONFLICT,
        )


def find_hf_files(checkpoint: Path, hf_folder: Path | None) -> Path:
    """Return the folder with the config.json and tokenizer of a checkpoint's model.

    It is `hf_folder`, or what from-hf left in the checkpoint, or model.path of the checkpoint's
    run.

    Raises:
        UserError: none of them has a config.json.
    """
    if hf_folder is not None:
        return hf_folder
    if is_hf(checkpoint / HF_FILES):
        return checkpoint / HF_FILES
    resolved = checkpoint.resolve()
    recipe = resolved.parents[1] / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"{checkpoint} does not say which model it is ({HF_FILES}/config.json and {recipe} are "
            "missing); give its Hugging Face folder with --config",
            key="--config",
            cause=Cause.MISSING,
        )
    model = Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["path"])
    if not is_hf(model):
        raise UserError(
            f"{recipe} says model.path {model}, which has no config.json seen from here; give that "
            "folder with --config",
            key="--config",
            cause=Cause.MISSING,
        )
    return model


def open_weights(path: Path, config: Path | None) -> Weights:
    """Open the weights of a Hugging Face folder or a checkpoint.

    Raises:
        UserError: weights are missing or damaged.
    """
    if is_hf(path):
        weights = HFWeights(path, read_config(path))
        weights.check(with_mtp=False)
        return weights
    return MegatronWeights(path, read_config(find_hf_files(path, config), path))


def fingerprint_source(path: Path) -> dict[str, list[int]]:
    """Return names, sizes and times of a model's files, to detect changes."""
    kinds = {".safetensors", ".distcp", ".metadata"}
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.iterdir())
        if file.suffix in kinds or file.name in kinds or file.name == "config.json"
    }
