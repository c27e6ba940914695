"""Supervises a run: starts its watchdog and health endpoint, and restarts lost trainer ranks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from megatron_r1.base.errors import TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.supervision.health import HealthServer
from megatron_r1.controller.supervision.watchdog import Watchdog
from megatron_r1.controller.supervision.watched_run import WatchedRun
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.server.errors import EngineError


class Supervisor:
    """Watches the roles of one run, and stops or restarts what hangs or has died."""

    def __init__(
        self, config: Config, recorder: RunRecorder, trainer: TrainerClient, *, spans_nodes: bool
    ) -> None:
        """Prepare to watch; `watching` begins.

        Args:
            config: the recipe.
            recorder: the run's record.
            trainer: the trainer's ranks, by their client.
            spans_nodes: the health endpoint listens on every address instead of 127.0.0.1."""
        self._run = WatchedRun(config, recorder, trainer)
        self._watchdog = Watchdog(self._run)
        self._host = "0.0.0.0" if spans_nodes else "127.0.0.1"

    def watch_rollouts(self, collector: RolloutCollector) -> None:
        """Also supervise engines, reward workers and their groups from now on."""
        self._run.collector = collector

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch the run, and serve its health, while the block runs. If the run hangs the block is
        cancelled; a block that ends all the same counts as it ended.

        Raises:
            HangError: the run hangs.
        """
        block = asyncio.current_task()
        assert block is not None
        async with contextlib.AsyncExitStack() as stack:
            if (port := self._run.config.run.health_port) is not None:
                server = HealthServer(self._watchdog, self._host, port)
                await stack.enter_async_context(server)
                self._run.recorder.view.show_message(f"health: {server.address}/health, /metrics")
            failures: list[Exception] = []
            watch = asyncio.create_task(self._watch_run(block, failures))
            try:
                yield
            except (Exception, asyncio.CancelledError):  # also what fails as it is cancelled
                if failures and block.cancelling() == 1:  # not by a second signal as well
                    raise failures[0] from None
                raise
            finally:
                if failures:
                    block.uncancel()
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def restart_trainer(self, loss: TrainerLost) -> None:
        """Start the trainer ranks again, which go on from the newest good checkpoint.

        Engines and reward workers live on meanwhile, and the sample log has what was sampled, so
        what is repeated is the training of the steps since the checkpoint.

        Raises:
            TrainerLost: `loss`, where `run.max_trainer_restarts` are done, or others start the
                ranks (torchrun restarts them together with the controller).
        """
        trainer, recorder = self._run.trainer, self._run.recorder
        max_restarts = self._run.config.run.max_trainer_restarts
        while True:
            if not trainer.can_restart or trainer.num_restarts >= max_restarts:
                raise loss
            count = f"restart {trainer.num_restarts + 1} of at most {max_restarts}"
            recorder.view.show_message(f"{loss}\nstarting the trainer ranks again, {count}")
            await asyncio.to_thread(trainer.kill)
            await self._free_gpus()
            recorder.rewind()
            recorder.view.show_phase(
                "restarting trainer", f"to go on after step {recorder.state.step}"
            )
            try:
                return await trainer.restart()
            except TrainerLost as again:
                loss = again

    async def _free_gpus(self) -> None:
        """Let engines on the trainer's GPUs sleep. Its ranks have been killed before: vLLM's sleep
        fails where a rank allocates meanwhile, because it compares how much of the GPU is free
        before and after (v1/worker/gpu_worker.py)."""
        collector = self._run.collector
        if collector is None or not self._run.config.rollout.colocated:
            return
        try:
            await collector.fleet.sleep()
        except EngineError as error:
            self._run.recorder.view.show_message(f"engines did not free their memory: {error}")

    async def _watch_run(self, block: asyncio.Task[Any], failures: list[Exception]) -> None:
        """Watch until cancelled. Where the run must stop, cancels `block` and appends why."""
        watch = asyncio.current_task()
        assert watch is not None
        try:
            await self._watchdog.watch()
        except Exception as error:
            if not watch.cancelling():  # else the block has ended: what the end of watching raises
                failures.append(error)
                block.cancel()
            raise
