"""Pushes the trainer's weights to the engines, one version after another.

The bytes of a push arrive while an engine generates with its own weights; engines pause only
while the new weights replace the old. Then each engine answers a few prompts, and the trainer must
compute the same log-probabilities; engines on other devices than the trainer sample the next
rollout meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from msgspec.structs import replace

from megatron_r1.base.errors import TrainerError, TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.push.engine_links import EngineLinks, OnEngineLost
from megatron_r1.controller.push.prober import EXACT_TOLERANCE, TOLERANCE, OffloadedProber, Prober
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import Engine, raise_dead_after
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.placement import hosts_address
from megatron_r1.engines.fleet.weight_swaps import weight_update_calls
from megatron_r1.engines.server.errors import EngineDied, EngineError, WeightsUnavailable
from megatron_r1.models import read_hf_config
from megatron_r1.push.control_messages import PushUpdateInfo
from megatron_r1.push.matching.adapter_push import engine_adapter, pushed_adapter_table
from megatron_r1.push.matching.recipe_plan import engine_layout
from megatron_r1.push.matching.tensors import pushed_tensors
from megatron_r1.trainer.operations import ModelOperations


def create_pusher(
    config: Config, trainer: TrainerClient, fleet: EngineFleet, probes: Sequence[Sequence[int]]
) -> WeightPusher:
    """Return the pusher of a run.

    Args:
        config: the recipe.
        trainer: the client of the trainer.
        fleet: the engines that get the weights.
        probes: the token ids of each prompt by which pushed weights are probed."""
    push, fp8 = config.push, config.push.fp8
    has_engine_hosts = config.rollout.placement == "hosts"
    is_exact = config.model.dtype == config.rollout.dtype == "float32" and not fp8
    hf_config = read_hf_config(config.model.path)
    adapters = pushed_adapter_table(config, hf_config)
    links = EngineLinks(
        trainer,
        push,
        pushed_tensors(hf_config, fp8=fp8, drafts=config.rollout.drafts_by_mtp, adapters=adapters),
        replace(engine_layout(config), engines=1),
        # Ranks that the controller has started meet at 127.0.0.1, unreachable from other hosts.
        store_host=hosts_address(config.rollout) if has_engine_hosts else None,
        colocated=config.rollout.colocated,
        adapter=engine_adapter(config, hf_config),
        notify=lambda line: fleet.state.notify(line),
    )
    tolerance = push.probe_tolerance or (EXACT_TOLERANCE if is_exact else TOLERANCE)
    offloads = config.parallel.offload_between_phases != "none"
    prober = (OffloadedProber if offloads else Prober)(
        trainer, probes, tolerance, push.timeout_seconds
    )
    return WeightPusher(fleet, links, prober, offloads=offloads)


class WeightPusher:
    """Pushes each new version of the trainer's weights to all engines.

    `open` and the first `push` are called in a block of `updating_weights`; then each change of the
    trainer's weights in another, with the `push` of the new ones at its end.

    `open` makes this pusher the fleet's sender of weights: an engine that is replaced, or joins,
    receives the trainer's weights while those are the version that the other engines have.

    Args:
        fleet: the engines that run, and their replacement.
        links: the links of the trainer to them; it also has the settings of pushes.
        prober: compares the engines with the trainer after each push; None: nothing is compared.
        offloads: the trainer offloads its weights when it has sent them, and engines compute in
            their memory (`parallel.offload_between_phases`)."""

    def __init__(
        self,
        fleet: EngineFleet,
        links: EngineLinks,
        prober: Prober | None = None,
        *,
        offloads: bool = False,
    ):
        self.fleet = fleet
        self.links = links
        self.prober = prober
        self.offloads = offloads
        if offloads:
            links.trainer.protect_offloaded_weights(lambda: fleet.engines_use_memory)
        self._timeout_seconds = links.settings.timeout_seconds
        self._weights_lock = asyncio.Lock()
        """Held while the weights change, and while an engine joins."""
        self._push_number = 0
        self._policy_version: int | None = None
        self._probe_task: asyncio.Task[dict[str, float]] | None = None
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def updating_weights(self) -> AsyncIterator[None]:
        """Keep engines from joining while the block changes the trainer's weights and pushes them.
        After an error in the block the engines that wait for weights get none, as after `close`."""
        async with self._weights_lock:
            self._policy_version = None
            try:
                yield
            except BaseException:
                self._is_closed = True
                raise

    async def open(self) -> None:
        """Connect trainer and engines, before the first push.

        Raises:
            EngineError: an engine that has not died cannot connect; its settings are wrong.
        """
        assert self._weights_lock.locked(), "it is called in a block of updating_weights()"
        await self.links.open()
        self.fleet.set_weight_sender(self.send_weights)
        with self.fleet.liveness_grace(self.links.connect_seconds):
            await self._form_sets(self._engines_up, self._replace_dead_or_raise)

    async def push(self, policy_version: int) -> dict[str, float]:
        """Make the trainer's present weights `policy_version` on every engine; return metrics.
        Await `probe_results` before anything that an engine computes from them is trained on or
        recorded, and before they are saved.

        Raises:
            EngineError: the weights arrived damaged.
        """
        assert self._weights_lock.locked(), "it is called in a block of updating_weights()"
        started_at = time.perf_counter()
        self._push_number += 1
        with self.fleet.liveness_grace(self.links.connect_seconds):
            engines_to_regroup = self.links.engines_to_regroup(self._engines_up)
            await self._form_sets(engines_to_regroup, self._replace_engine)
            await self._send_to_all()
            await self._offload_trainer()
            sent_at = time.perf_counter()
            await self.fleet.swap_weights(self._update_info(), policy_version)
        swapped_at = time.perf_counter()
        metrics = {"push/transfer": sent_at - started_at, "push/pause": swapped_at - sent_at}
        metrics |= {"push/links": self.links.num_links, "push/bytes": self.links.num_bytes}
        self._policy_version = policy_version
        if self.prober is not None:
            check = self.prober.check(self._push_number, self._engines_up, self._replace_engine)
            self._probe_task = asyncio.create_task(check)
            # After another failure of the run no task awaits this one. Its error is read here, so
            # that asyncio does not log it.
            self._probe_task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if self.links.colocated:  # trainer and engines compute in turns
            await self.probe_results()
        return metrics

    async def probe_results(self) -> dict[str, float]:
        """Return the metrics of the last push's probes, "push/probe_diff", when the engines have
        answered.

        Raises:
            EngineError: an engine computes something else than the trainer.
        """
        return {} if self._probe_task is None else await self._probe_task

    @contextlib.asynccontextmanager
    async def send_weights(self, engine: Engine) -> AsyncIterator[bool]:
        """Push the fleet's current weights to an engine that has not joined yet; yield whether it
        got them. Where engines compute in the memory of the trainer's weights, it gets none, and
        sleeps until the next push.

        No push begins within. Waits while the trainer's weights are between two versions.

        Raises:
            EngineError: the push to the engine fails.
            WeightsUnavailable: the trainer's ranks are gone.
        """
        async with self._weights_lock:
            if self._is_closed:
                raise WeightsUnavailable(
                    f"{engine.name}: the trainer that had weights for it is gone"
                )
            if self.offloads:
                # The trainer's weights come back into the memory of engines that sleep.
                async with raise_dead_after(engine, self._timeout_seconds):
                    await engine.client.sleep()
                if self.fleet.engines_use_memory:
                    yield False
                    return
            try:
                await self._push_to_new(engine)
            except TrainerLost as lost:
                raise WeightsUnavailable(f"{engine.name}: no weights for it: {lost}") from lost
            except TrainerError as error:  # the run receives it as well, and may recover
                raise EngineError(f"{engine.name}: no weights for it: {error}") from error
            yield True

    def close(self) -> None:
        """Refuse engines that wait for weights: the trainer is gone, or about to end."""
        self._is_closed = True
        if self._probe_task is not None:
            self._probe_task.cancel()

    async def _send_to_all(self) -> None:
        """Send to all engines, and again to those whose set fails for no fault of theirs."""
        engines_left = self._engines_up
        while engines_left:
            with self.links.report_deaths():
                engines_left = await self.links.send(
                    self._push_number, engines_left, self._replace_engine
                )
            engines_left = [engine for engine in engines_left if engine.is_up]
            await self._form_sets(engines_left, self._replace_engine)

    async def _offload_trainer(self) -> None:
        """Let the trainer offload its weights, where the engines are to compute in their memory."""
        if self.prober is not None:
            await self.prober.prepare()
        if self.offloads:
            await self.links.trainer.call(ModelOperations.free_memory, free_parameters=True)

    async def _form_sets(self, engines: Sequence[Engine], on_engine_lost: OnEngineLost) -> None:
        # Engines that sleep, for the trainer's sake, must not compute before they are awake.
        resume = self.fleet.awake.is_set() and not self.offloads
        await self.links.form_sets(engines, on_engine_lost, resume=resume)

    @property
    def _engines_up(self) -> list[Engine]:
        return [engine for engine in self.fleet.engines if engine.is_up]

    def _replace_engine(self, engine: Engine, error: EngineError) -> None:
        death = error if isinstance(error, EngineDied) else EngineDied(str(error))
        self.fleet.replace(engine, death)

    def _replace_dead_or_raise(self, engine: Engine, error: EngineError) -> None:
        """Replace a dead engine. An engine that lives has wrong settings: its error is raised."""
        if not isinstance(error, EngineDied):
            raise error
        self.fleet.replace(engine, error)

    async def _push_to_new(self, engine: Engine) -> None:
        await self._form_sets([engine], _raise_error)
        if self.links.colocated and not self.offloads:
            # What its cache takes is needed for the weights in transit.
            async with raise_dead_after(engine, self._timeout_seconds):
                await engine.client.sleep()
        # The others' last number: the pushes to an engine are numbered without gaps.
        with self.links.report_deaths():
            await self.links.send(self._push_number, [engine], _raise_error)
        await self._offload_trainer()
        await self._swap_new(engine)
        if self.prober is not None:
            await self.prober.check(self._push_number, [engine], _raise_error)

    async def _swap_new(self, engine: Engine) -> None:
        assert self._policy_version is not None, "no push has been made"
        # An engine outside the fleet has no watchdog, and the next push waits for it.
        are_asleep = self.links.colocated  # since `_push_to_new`
        async with raise_dead_after(engine, self._timeout_seconds):
            for call in weight_update_calls(
                self._update_info(), self._policy_version, asleep=are_asleep
            ):
                await call(engine.client)

    def _update_info(self) -> PushUpdateInfo:
        return PushUpdateInfo(self._push_number, self._timeout_seconds)


def _raise_error(engine: Engine, error: EngineError) -> None:
    """Raise the error of an engine that is not in the fleet yet, so that it does not join."""
    raise error
