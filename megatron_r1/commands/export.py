"""A checkpoint of a run as a Hugging Face folder, made by the trainer that wrote it."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.evaluation.model_folder import find_model
from megatron_r1.files import atomic_write, fsync
from megatron_r1.training.checkpoints import manifest
from megatron_r1.training.client import TrainerClient

MADE_OF = ".made_of"
"""In an exported folder: the checksum of the checkpoint's manifest, and so of all its files."""


async def export_checkpoint(
    checkpoint: Path, target: Path, parallel: ParallelConfig, log_folder: Path
) -> None:
    """Write `target`, whole or not at all; nothing to do where it was made of this checkpoint. One
    made of another is replaced.

    checkpoint: `…/checkpoints/step_…` of a run, whose `config.yaml` says what the model is.
    parallel: over how many trainer processes, which need not be as many as trained it. Raises
    ValueError for a checkpoint outside a run, TrainerError when the trainer fails.
    """
    listed, known = checkpoint / manifest.NAME, target / MADE_OF
    # Without a manifest it is damaged, which loading says.
    made_of = manifest.checksum(listed).checksum if listed.is_file() else ""
    if known.is_file() and known.read_text(encoding="ascii") == made_of:
        return
    recipe = checkpoint.parents[1] / "config.yaml"
    if not recipe.is_file():
        raise ValueError(
            f"{checkpoint} is not in a run's folder: {recipe}, which says what model it is, is "
            "missing"
        )
    trained: Config = configuration.load(recipe)
    trainer = TrainerClient(trained.model_copy(update={"parallel": parallel}), log_folder)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        trainer.launch()
        await trainer.connect()
        await trainer.call("load_checkpoint", folder=str(checkpoint.resolve()), reference=False)
        await trainer.call("export", folder=str(partial.resolve()))
    finally:
        await trainer.close()
    atomic_write(partial / MADE_OF, made_of)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    fsync(target.parent)


async def model_to_serve(config: Config, folder: Path) -> Path:
    """The Hugging Face folder that `model.path` means: itself, a run's, or a checkpoint's, which is
    exported into `folder` first. Raises as `find_model` and `export_checkpoint`."""
    model, must_export = find_model(config.model.path)
    if must_export:
        target = folder / f"hf_{model.name}"
        print(f"exporting {model} to {target}", flush=True)
        await export_checkpoint(model, target, config.parallel, folder / "logs")
        model = target
    print(f"model: {model}", flush=True)
    return model
