"""Common parts of eval and sample: a locked run folder, the end by a signal, the sampled model. A
run's checkpoint is first exported as a Hugging Face folder, with the trainer that wrote it."""

import asyncio
import shutil
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.config.eval import ServerConfig
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.data.few_shot import FewShotExamples
from megatron_r1.evaluation.evaluated_model import EvaluatedModel
from megatron_r1.evaluation.identity import require_same_identity
from megatron_r1.evaluation.model_folder import find_model
from megatron_r1.evaluation.remote_model import RemoteModel
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints import checkpoint_folders
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
    listed, exported = checkpoint / checkpoint_folders.MANIFEST, target / SOURCE_FILE
    # A checkpoint without manifest is damaged: loading it raises.
    source = checkpoint_folders.file_entry(listed).checksum if listed.is_file() else ""
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


async def _model_to_serve(config: Config, folder: Path) -> Path:
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


def run_in_folder(
    config: Config, name: str, body: Callable[[RunFolder], Coroutine[Any, Any, None]]
) -> None:
    """Run `body` with run.folder locked.

    Args:
        config: the recipe.
        name: what the work is called in errors.
        body: what runs, given the folder.

    Raises:
        UserError: the folder belongs to a training run.
        KeyboardInterrupt: the work is asked to stop."""
    folder = RunFolder(config.run.folder)
    if folder.metrics_path.exists() or folder.checkpoints.exists():
        raise UserError(
            f"run.folder {folder.path} is that of a training run: give {name} a folder of its own, "
            "and the run as model.path",
            key="run.folder",
            cause=Cause.EXISTS,
        )

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await body(folder)

    with folder:
        try:
            asyncio.run(run())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def open_evaluated_model(
    config: Config,
    folder: Path,
    server: ServerConfig | None,
    key: str,
    decoding: SamplingSettings,
    shots: FewShotExamples | None = None,
) -> EvaluatedModel:
    """Return the served model, or engines for `model.path`; a checkpoint is exported first.

    Args:
        config: the recipe.
        folder: the run's folder.
        server: the served model; None: engines.
        key: the name of `server` in the recipe.
        decoding: the sampling parameters.
        shots: worked examples before every question."""
    if server is not None:
        return RemoteModel(server, config.data.template, decoding, shots, key)
    from megatron_r1.evaluation.engine_model import EngineModel

    model = await _model_to_serve(config, folder)
    return EngineModel(config, model, decoding, folder, shots)


def require_same_settings(
    folder: RunFolder, config: Config, settings: Mapping[str, Any], log: ResponseLog
) -> None:
    """Write the recipe.

    Args:
        folder: the run's folder.
        config: the recipe.
        settings: all settings that responses and grades depend on.
        log: the responses that are logged already.

    Raises:
        UserError: the settings differ from those of the logged responses."""
    models = folder.read_config().get("model", {}).get("path"), config.model.path
    identity = folder.path / "identity.json"
    require_same_identity(identity, settings, bool(log.digests), models)
    # All other settings may change between starts; the file has those of the latest.
    folder.write_config(config.model_dump(), may_change=tuple(Config.model_fields))
