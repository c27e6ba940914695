"""Imports of vLLM and Megatron-Core that begin while the controller reads the data."""

from megatron_r1.base.processes import fork_client
from megatron_r1.commands.parts import torchrun
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.rank_processes import RANK_MODULE as RANK
from megatron_r1.controller.trainer_calls.rank_processes import import_environment
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.settings import SERVER_MODULE as ENGINE
from megatron_r1.engines.server.settings import EngineSettings


def preload_vllm(config: Config) -> None:
    """Begin the import of vLLM for engines on this host: four seconds of CPU. The process ends with
    this one, also if no engine is started. Call it once the settings are checked."""
    if config.rollout.placement == "local":
        host_settings = engine_settings(config.rollout)
        replay = config.rl.routing_replay
        settings = EngineSettings(
            device=gpu.engine_device(), return_routing=replay, **host_settings
        )
        fork_client.preload(ENGINE, settings.environment())


def preload_megatron() -> None:
    """Begin the import of Megatron-Core, two seconds of CPU, in a process from which trainer ranks
    are forked. Only for ranks that the controller starts, on a host without GPUs."""
    if torchrun.starts_ranks() and not gpu.is_usable():
        fork_client.preload(RANK, import_environment())
