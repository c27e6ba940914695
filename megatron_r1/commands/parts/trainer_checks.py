"""What training is refused for before its trainer ranks start: a layout or a model that they cannot
use."""

from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.weight_files import require_complete, weight_files
from megatron_r1.commands.parts import torchrun
from megatron_r1.config import Config, ModelConfig
from megatron_r1.config.algorithms import find_rules
from megatron_r1.controller.trainer_calls.packing import check_batches
from megatron_r1.models.exchange_overlap_checks import check_exchange_overlap
from megatron_r1.models.hf_config import num_mtp_layers
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.adapter_table import check_adapters


def check_trainer(config: Config, verb: str) -> None:
    """Raise UserError where the trainer cannot run as set. Its ranks do not fit `parallel`, or are
    too many for the batches of `verb`; a target of `model.lora` is not there; or the experts'
    exchange cannot be overlapped. Call it before anything starts: in RL the trainer itself would
    fail only after the engines' start and a whole rollout."""
    world_size = torchrun.world_size(config)
    config.parallel.check_sizes(world_size)
    trains_mtp = config.model.mtp == "train"
    if trains_mtp and not num_mtp_layers(read_hf_config(config.model.path, None)):
        raise UserError(
            f"model.mtp: train, but {config.model.path} has no MTP layers; leave it out",
            key="model.mtp",
            cause=Cause.CONFLICT,
        )
    if config.model.lora is not None:
        check_adapters(config, read_hf_config(config.model.path))
    if config.parallel.overlap_expert_exchange:
        check_exchange_overlap(config, read_hf_config(config.model.path, config.model.head))
        if verb == "rl" and find_rules(config.rl.algorithm).critic:
            critic_run_config = config.critic_run_config()
            check_exchange_overlap(
                critic_run_config,
                read_hf_config(critic_run_config.model.path, "score", "critic.path"),
            )
    for _, settings in config.schedule_parts():
        check_batches(settings, verb, world_size)


def check_weights(model: ModelConfig) -> None:
    """Raise UserError where ranks and engines, once started, would find no weights.

    Args:
        model: section `model` of the recipe."""
    if model.init == "load" and not model.checkpoint:
        try:
            weight_files(Path(model.path))
        except UserError as error:
            raise UserError(
                f"model.path: {error}; give a folder with weights, or model.init: random to sft",
                key="model.path",
                cause=error.cause,
            ) from None
        require_complete(Path(model.path))
