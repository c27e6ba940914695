"""Runs a stage's work with somebody watching: the watchdog, and the health endpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from megatron_r1.config import Config
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.supervision.health import HealthServer
from megatron_r1.supervision.restarts import with_restarts
from megatron_r1.supervision.run_handles import RunHandles
from megatron_r1.supervision.watchdog import Watchdog
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder


class Supervisor:
    """Of one run."""

    def __init__(
        self, config: Config, recorder: Recorder, trainer: TrainerClient, *, spans_hosts: bool
    ) -> None:
        """spans_hosts: the health endpoint listens on every address, else on this host's own."""
        self._watched = RunHandles(config, recorder, trainer)
        self._watchdog = Watchdog(self._watched)
        self._host = "0.0.0.0" if spans_hosts else "127.0.0.1"

    def watch_rollouts(self, rollouts: RolloutCollector) -> None:
        """From here on engines, reward workers and their work are run too."""
        self._watched.rollouts = rollouts

    async def with_restarts(self, attempt) -> None:
        """`restarts.with_restarts`, by this run's settings."""
        run = self._watched
        most = run.config.run.max_trainer_restarts
        await with_restarts(attempt, run.trainer, run.recorder, most)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`. Raises what it raises, or HangError, after which `work` was cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            if (port := self._watched.config.run.health_port) is not None:
                server = HealthServer(self._watchdog, self._host, port)
                try:
                    await stack.enter_async_context(server)
                except BaseException:
                    work.close()
                    raise
                self._watched.recorder.view.message(f"health: {server.address}/health, /metrics")
            tasks = [asyncio.create_task(work), asyncio.create_task(self._watchdog.watch())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                # Both at once: the work's own end counts.
                await next(task for task in tasks if task in done)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
