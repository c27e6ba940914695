"""What eval and sample share: a locked run folder, an end by signal, and the sampled model."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.config.evaluation import ServerConfig
from megatron_r1.data.shots import Shots
from megatron_r1.errors import UserError
from megatron_r1.evaluation.policy import Decoding, Policy
from megatron_r1.evaluation.server_policy import ServerPolicy
from megatron_r1.reporting.run_folder import RunFolder


def run_in_folder(
    config: Config, name: str, body: Callable[[RunFolder], Coroutine[Any, Any, None]]
) -> None:
    """Run `body` with run.folder locked. name: of the work, for errors.

    Raises UserError if the folder is that of a training run, KeyboardInterrupt when asked to stop.
    """
    folder = RunFolder(config.run.folder)
    if folder.metrics_path.exists() or folder.checkpoints.exists():
        raise UserError(
            f"run.folder {folder.path} is that of a training run: give {name} a folder of its own, "
            "and the run as model.path"
        )
    with folder:
        try:
            asyncio.run(_stoppable(body(folder)))
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
    """Return the served model, or engines for `model.path`; a checkpoint is exported first.

    key: of `server` in the recipe. shots: worked examples before every question.
    """
    if server is not None:
        return ServerPolicy(server, config.data.template, decoding, shots, key)
    from megatron_r1.commands.export import model_to_serve
    from megatron_r1.evaluation.engine_policy import EnginePolicy

    model = await model_to_serve(config, folder)
    return EnginePolicy(config, model, decoding, folder, shots)


async def _stoppable(body: Coroutine[Any, Any, None]) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await body
