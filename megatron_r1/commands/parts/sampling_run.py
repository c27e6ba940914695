"""What `eval` and `sample` share: a locked run folder, the end by a signal, the model that is
sampled."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.parts.checkpoint_export import model_folder_to_serve
from megatron_r1.config import Config
from megatron_r1.config.eval import ServerConfig
from megatron_r1.data.few_shot import FewShotExamples
from megatron_r1.evaluation.evaluated_model import EvaluatedModel
from megatron_r1.evaluation.identity import require_same_identity
from megatron_r1.evaluation.remote_model import RemoteModel
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.reporting.run_folder import RunFolder


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

    model = await model_folder_to_serve(config, folder)
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
