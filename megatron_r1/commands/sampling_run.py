"""Common parts of eval and sample: a locked run folder, the end by a signal, the sampled model."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.export import model_to_serve
from megatron_r1.config import Config
from megatron_r1.config.evaluation import ServerConfig
from megatron_r1.data.shots import Shots
from megatron_r1.evaluation.identity import require_same_identity
from megatron_r1.evaluation.response import Decoding, Policy
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.server_policy import ServerPolicy
from megatron_r1.reporting.run_folder import RunFolder


def run_in_folder(
    config: Config, name: str, body: Callable[[RunFolder], Coroutine[Any, Any, None]]
) -> None:
    """Run `body` with run.folder locked. name: what the work is called in errors. Raises UserError
    if the folder belongs to a training run, KeyboardInterrupt when asked to stop."""
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


async def make_policy(
    config: Config,
    folder: Path,
    server: ServerConfig | None,
    key: str,
    decoding: Decoding,
    shots: Shots | None = None,
) -> Policy:
    """Return the served model, or engines for `model.path`; a checkpoint is exported first. key:
    the name of `server` in the recipe. shots: worked examples before every question."""
    if server is not None:
        return ServerPolicy(server, config.data.template, decoding, shots, key)
    from megatron_r1.evaluation.engine_policy import EnginePolicy

    model = await model_to_serve(config, folder)
    return EnginePolicy(config, model, decoding, folder, shots)


def require_same_settings(
    folder: RunFolder, config: Config, settings: Mapping[str, Any], log: ResponseLog
) -> None:
    """Write the recipe. settings: all settings that responses and grades depend on. Raises
    UserError if they differ from the settings of the responses that are logged already."""
    models = folder.read_config().get("model", {}).get("path"), config.model.path
    identity = folder.path / "identity.json"
    require_same_identity(identity, settings, bool(log.digests), models)
    # All other settings may change between starts; the file has those of the latest.
    folder.write_config(config.model_dump(), may_change=tuple(Config.model_fields))
