"""The controller's side of a run that samples, next to a trainer: engines, teachers, graders and
sample log."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from r1_grading import RewardPool

from megatron_r1.base.transports import BACKEND_PREFIX
from megatron_r1.commands.rl_prompts import explain_renamed_columns
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.controller.rollouts.teacher_fleets import open_teachers
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import Player
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.fleet.placement import open_host_pool, server_maker
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.environment_variables import fp8_scale_environment
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.engines.server.recipe_settings import engine_settings, fleet_settings
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.formats import published_layout
from megatron_r1.push.matching.adapter_push import lora_arguments


@dataclass(frozen=True)
class RolloutServices:
    """What samples and grades in a run: `collector`, with engines that are still to be started.

    Attributes:
        collector: samples and grades the groups of a step.
        sample_log: the log of finished groups; None without `rl.sample_log`.
        hosts: the hosts of engines that may join."""

    collector: RolloutCollector
    sample_log: SampleLog | None
    hosts: HostPool | None

    async def check(self, config: Config, prompts: PromptSplit) -> None:
        """Raise UserError for questions that a reward of the run, or of a later part of it, cannot
        grade."""
        terms = {term: None for _, part in config.schedule_parts() for term in part.rewards.weights}
        with explain_renamed_columns(config.data.columns):
            await self.collector.check(terms, prompts.train + prompts.heldout)


@contextlib.asynccontextmanager
async def open_rollout_services(
    config: Config, recorder: RunRecorder, tokenizer: PromptTokenizer
) -> AsyncIterator[RolloutServices]:
    """Yield what samples and grades; close it, and all that it uses, at the end of the block.

    Args:
        config: the recipe.
        recorder: the run's folder and view.
        tokenizer: how questions become tokens."""
    rewards, notify, folder = config.rewards, recorder.view.show_message, recorder.folder
    on_one_node, logs = config.push.on_one_node, folder.path / "logs"
    async with open_host_pool(config.rollout, folder.path, on_one_node, notify) as hosts:
        pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
        fleet = _make_fleet(config, recorder, hosts)
        teachers = open_teachers(config, logs, notify)
        player = open_player(config, tokenizer)
        collector = RolloutCollector(fleet, pool, tokenizer, rewards, teachers, player)
        sample_log, is_kept = SampleLog(folder.sample_log, notify), config.rl.sample_log
        try:
            if not is_kept:
                await sample_log.prune()  # old samples are not of this run's policies
            yield RolloutServices(collector, sample_log if is_kept else None, hosts)
        finally:
            closing = [fleet.close(), collector.close(), pool.close(), sample_log.close()]
            if teachers is not None:
                closing.append(teachers.close())
            await asyncio.gather(*closing)


def open_player(config: Config, tokenizer: PromptTokenizer) -> Player | None:
    """Return the player of the run's episodes; None if responses are single turns, which need
    nothing of `megatron_r1.agents`."""
    if not config.agents.player_settings:
        return None
    from megatron_r1.controller.rollouts.players import make_player

    return make_player(config, tokenizer)


def _make_fleet(config: Config, recorder: RunRecorder, hosts: HostPool | None) -> EngineFleet:
    rollout = config.rollout
    return EngineFleet(
        rollout.engines,
        recorder.folder.path / "logs",
        notify=recorder.view.show_message,
        make_server=server_maker(hosts),
        weight_transfer_backend=BACKEND_PREFIX + config.push.transport,
        device=gpu.engine_device(),
        enable_sleep_mode=rollout.colocated,
        max_model_len=max_model_len(config),
        # A run that continues must not draw the numbers of its beginning again.
        seed=config.run.seed * 1_000_003 + recorder.state.step,
        return_routing=config.rl.routing_replay,
        return_sampling_mask=config.rollout.uses_sampling_mask,
        **_model_as_pushed(config),
        **fleet_settings(rollout),
        **engine_settings(rollout),
    )


def _model_as_pushed(config: Config) -> dict[str, Any]:
    """Return engine settings for a model whose weights are pushed: the folder's weights are not
    read, and `push.fp8` alone decides whether weights are FP8. Where adapters alone are pushed, the
    folder's weights are read."""
    hf_config = read_hf_config(config.model.path)
    if config.push.adapter_only:
        return {"lora": lora_arguments(config, hf_config)}
    settings: dict[str, Any] = {"extra_args": ["--load-format", "dummy"]}
    if config.push.fp8:
        settings["hf_overrides"] = {"quantization_config": published_layout.fp8_config(hf_config)}
        settings["extra_env"] = fp8_scale_environment(hf_config)
    elif "quantization_config" in hf_config:
        settings["hf_overrides"] = {"quantization_config": None}
    return settings
