"""Runs the work of a command under a watchdog and a health endpoint, and restarts lost ranks."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from megatron_r1.base.errors import TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.supervision.health import HealthServer
from megatron_r1.controller.supervision.run_handles import RunHandles
from megatron_r1.controller.supervision.watchdog import Watchdog
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.controller.trainer_calls.recorder import Recorder


class Supervisor:
    """Watches the roles of one run, and stops or restarts what hangs or has died."""

    def __init__(
        self, config: Config, recorder: Recorder, trainer: TrainerClient, *, spans_hosts: bool
    ) -> None:
        """spans_hosts: the health endpoint listens on every address instead of 127.0.0.1."""
        self._run = RunHandles(config, recorder, trainer)
        self._watchdog = Watchdog(self._run)
        self._host = "0.0.0.0" if spans_hosts else "127.0.0.1"

    def watch_rollouts(self, rollouts: RolloutCollector) -> None:
        """Also supervise engines, reward workers and their groups from now on."""
        self._run.rollouts = rollouts

    async def with_restarts(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Await `attempt()`, and again each time trainer ranks are lost in it, at most
        `run.max_trainer_restarts` times.

        The ranks start again and continue from the newest good checkpoint. Engines and reward
        workers live on meanwhile, and the sample log has what was sampled, so what is repeated is
        the training of the steps since the checkpoint.

        attempt: continues from the recorder's checkpoint, with ranks that have just started. Raises
        what it raises; TrainerLost where no restart is left, or where others start the ranks
        (torchrun restarts them together with the controller)."""
        while True:
            try:
                return await attempt()
            except TrainerLost as loss:
                await self._restart_trainer(loss)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`. Raises what it raises; cancels it and raises HangError if it hangs."""
        async with contextlib.AsyncExitStack() as stack:
            if (port := self._run.config.run.health_port) is not None:
                server = HealthServer(self._watchdog, self._host, port)
                try:
                    await stack.enter_async_context(server)
                except BaseException:
                    work.close()
                    raise
                self._run.recorder.view.message(f"health: {server.address}/health, /metrics")
            tasks = [asyncio.create_task(work), asyncio.create_task(self._watchdog.watch())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                # If both have ended, the result of the work counts.
                await next(task for task in tasks if task in done)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _restart_trainer(self, loss: TrainerLost) -> None:
        trainer, recorder = self._run.trainer, self._run.recorder
        most = self._run.config.run.max_trainer_restarts
        while True:
            if not trainer.can_restart or trainer.num_restarts >= most:
                raise loss
            count = f"restart {trainer.num_restarts + 1} of at most {most}"
            recorder.view.message(f"{loss}\nstarting the trainer ranks again, {count}")
            trainer.kill()
            recorder.go_back()
            recorder.view.phase("restarting trainer", f"to go on after step {recorder.state.step}")
            try:
                return await trainer.restart()
            except TrainerLost as again:
                loss = again
