"""`identity.json`: the settings that must not change while a folder of samples is continued, and a
model's fingerprint, which is one of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.file_blocks import sample_blocks
from megatron_r1.config import Config

NUM_BLOCKS = 16
"""Blocks of each of a model's files that count in its fingerprint."""
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "tokenizer.model")


def identity_settings(config: Config, model_identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that changes samples and grades; the number of samples and questions may grow."""
    return {
        "run.seed": config.run.seed,
        "eval.temperature": config.eval.temperature,
        "eval.top_p": config.eval.top_p,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "rewards.options": config.rewards.call_options,
        **model_identity,
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
    logged, current = models
    weights = f" (of model.path: {logged} in the folder, {current} now)"
    if logged == current:
        weights = f" (the files in model.path, {current}, have changed since)"
    changed = [
        name
        for name in names
        if _deciding_part(name, before.get(name)) != _deciding_part(name, settings.get(name))
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


def _deciding_part(name: str, value: Any) -> Any:
    """Return the part of a setting that decides samples and grades: everything except the addresses
    in `rewards.options`, because a served model may move to another host."""
    if name != "rewards.options" or not value:
        return value
    return {
        reward: {k: v for k, v in options.items() if k != "url"}
        for reward, options in value.items()
    }


def fingerprint_model(folder: Path) -> str:
    """Return a digest of a model folder's files: names, sizes, and 16 blocks of 64 KiB of each.
    Training changes nearly every weight, so the blocks distinguish models without reading hundreds
    of gigabytes."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in WEIGHTS for p in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in sample_blocks(path, NUM_BLOCKS):
            digest.update(block)
    return digest.hexdigest()[:16]
