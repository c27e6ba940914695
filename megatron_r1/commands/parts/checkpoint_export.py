"""Exports a run's checkpoint as a Hugging Face folder, with the trainer that wrote it."""

import shutil
from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.evaluation.model_folder import find_model
from megatron_r1.trainer.checkpoints import manifest
from megatron_r1.trainer.operations import CheckpointOperations

SOURCE_FILE = ".made_of"
"""The file of an exported folder with the checksum of the checkpoint's manifest, which covers all
files of the checkpoint."""


async def export_checkpoint(
    checkpoint: Path, target: Path, parallel: ParallelConfig, log_folder: Path
) -> None:
    """Write `target` completely or not at all, unless it is an export of this checkpoint already.

    Args:
        checkpoint: `…/checkpoints/step_…` of a run, whose `config.yaml` describes the model.
        target: the folder that the model is written to.
        parallel: layout of the exporting trainer, which may differ from that of the training.
        log_folder: the folder of the trainer's logs.

    Raises:
        UserError: a checkpoint outside a run.
        TrainerError: the trainer fails."""
    listed, exported = checkpoint / manifest.MANIFEST, target / SOURCE_FILE
    # A checkpoint without manifest is damaged: loading it raises.
    source = manifest.file_entry(listed).checksum if listed.is_file() else ""
    if exported.is_file() and exported.read_text(encoding="ascii") == source:
        return
    recipe = checkpoint.resolve().parents[1] / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"{checkpoint} is not in a run's folder: {recipe} with its settings is missing",
            key="checkpoint",
            cause=Cause.NOT_FOUND,
        )
    trained_config: Config = configuration.load_recipe(recipe)
    trainer = TrainerClient(trained_config.model_copy(update={"parallel": parallel}), log_folder)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        trainer.launch()
        await trainer.connect()
        await trainer.call(
            CheckpointOperations.load_checkpoint,
            folder=str(checkpoint.resolve()),
            with_reference=False,
        )
        await trainer.call(CheckpointOperations.export, folder=str(partial.resolve()))
    finally:
        await trainer.close()
    atomic_write(partial / SOURCE_FILE, source)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    fsync(target.parent)


async def model_folder_to_serve(config: Config, folder: Path) -> Path:
    """Return the Hugging Face folder for `model.path`: the path itself, the export of a run, or a
    checkpoint, which is exported into `folder` first.

    Raises:
        UserError: the path is no model, run or checkpoint, or the checkpoint is outside a run.
        TrainerError: the trainer that exports the checkpoint fails.
    """
    model, must_export = find_model(config.model.path)
    if must_export:
        target = folder / f"hf_{model.name}"
        print(f"exporting {model} to {target}", flush=True)
        await export_checkpoint(model, target, config.parallel, folder / "logs")
        model = target
    print(f"model: {model}", flush=True)
    return model
