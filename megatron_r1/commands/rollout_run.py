"""The controller's side of a run that samples: engines, teacher, graders and sample log."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from r1_grading import RewardPool

from megatron_r1.config import Config
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.controller.teacher import teacher_fleet
from megatron_r1.controller.trainer_calls.recorder import Recorder
from megatron_r1.data.text import PromptText
from megatron_r1.engines.fleet.hosts.pool import HostPool
from megatron_r1.engines.fleet.placement import server_maker
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.episodes import Player
from megatron_r1.engines.server.from_config import engine_settings, fleet_settings
from megatron_r1.engines.server.limits import context_length
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.stored import fp8


@contextlib.asynccontextmanager
async def open_rollouts(
    config: Config, recorder: Recorder, text: PromptText, hosts: HostPool | None
) -> AsyncIterator[tuple[RolloutCollector, SampleLog]]:
    """Yield the collector, whose engines are still to be started, and the log of finished groups;
    close both, and all that the collector uses, at the end of the block.

    hosts: where engines run that are not on this host."""
    rewards, notify = config.rewards, recorder.view.message
    pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
    fleet = _fleet(config, recorder, hosts)
    logs = recorder.folder.path / "logs"
    teacher = teacher_fleet(config, logs, notify) if config.teacher.path else None
    collector = RolloutCollector(fleet, pool, text, rewards, teacher, open_player(config, text))
    log = SampleLog(recorder.folder.sample_log, notify)
    try:
        yield collector, log
    finally:
        fleets = [fleet, teacher] if teacher is not None else [fleet]
        closing = collector.close(), pool.close(), log.close()
        await asyncio.gather(*(each.close() for each in fleets), *closing)


def open_player(config: Config, text: PromptText) -> Player | None:
    """Return the player of the run's episodes; None if responses are single turns, which need
    nothing of `megatron_r1.agents`."""
    if not config.agents.players:
        return None
    from megatron_r1.controller.rollouts.environments import player_of

    return player_of(config, text)


def _fleet(config: Config, recorder: Recorder, hosts: HostPool | None) -> RolloutFleet:
    rollout = config.rollout
    return RolloutFleet(
        rollout.engines,
        recorder.folder.path / "logs",
        notify=recorder.view.message,
        make_server=server_maker(hosts),
        weight_transfer_backend=f"megatron_r1_{config.push.transport}",
        device=gpu.device(),
        sleeps=rollout.colocated,
        max_model_len=context_length(config),
        # A run that continues must not draw the numbers of its beginning again.
        seed=config.run.seed * 1_000_003 + recorder.state.step,
        return_routing=config.rl.routing_replay,
        **_model_as_pushed(config),
        **fleet_settings(rollout),
        **engine_settings(rollout),
    )


def _model_as_pushed(config: Config) -> dict[str, Any]:
    """Return engine settings for a model whose weights are pushed: the folder's weights are not
    read, and `push.fp8` alone decides whether weights are FP8."""
    overrides = None
    if config.push.fp8 or "quantization_config" in read_hf_config(config.model.path):
        overrides = {"quantization_config": fp8.CONFIG if config.push.fp8 else None}
    return {"extra_args": ["--load-format", "dummy"], "hf_overrides": overrides}
