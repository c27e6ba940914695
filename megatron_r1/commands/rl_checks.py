"""What an RL run checks before anything starts: its settings against each other, the model and the
GPUs of this host. `rl_prompts` reads the prompts that it may draw.

Trainer ranks take the first GPUs, engines that run on the controller's host equal shares of all
(`engines.server.gpu`): both are on the same GPUs. `parts.guessed_settings.guess_layout` decides
the placement that `init` writes, and that a recipe without one is refused with."""

import math
import os
import subprocess
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.commands.parts import torchrun
from megatron_r1.commands.parts.guessed_settings import guess_layout, yaml_value_text
from megatron_r1.commands.parts.node_resources import detect_node_resources
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.config import Config
from megatron_r1.controller import algorithms
from megatron_r1.controller.teacher_checks import check_teachers
from megatron_r1.engines.fleet.placement import check_room, hosts_address
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.cpu_kernel_checks import check_cpu_kernels
from megatron_r1.engines.server.recipe_checks import check_engines, check_local_engines
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.parallel_checks import check_divisions
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.models.weights import num_parameters
from megatron_r1.push.matching.recipe_plan import check_pushes

VLLM_FRACTION = 0.92
"""vLLM's default of --gpu-memory-utilization (config/cache.py)."""


def engines_share_gpus(config: Config) -> bool:
    """Whether the policy's engines are on GPUs of trainer ranks."""
    is_local = config.rollout.placement == "local"
    return gpu.is_usable() and (is_local or config.rollout.colocated)


def check_gpu_memory(config: Config, hf_config: HFConfig) -> None:
    """Refuse engines that take vLLM's share of GPUs, nearly all, where trainer ranks are on them.

    Args:
        config: the recipe.
        hf_config: the model's config.json.

    Raises:
        UserError: the engines' share is not set."""
    rollout = config.rollout
    if engines_share_gpus(config) and rollout.gpu_memory is None:
        raise UserError(
            f"rollout.gpu_memory is not set, and vLLM takes {VLLM_FRACTION} of GPUs that trainer "
            f"ranks are on: set {_suggest_placement(config, hf_config)}; megatron-r1 plan prints "
            "the largest share",
            key="rollout.gpu_memory" if rollout.colocated else "rollout.colocated",
            cause=Cause.MISSING if rollout.colocated else Cause.CONFLICT,
        )
    for key, teacher in config.teacher.sections.items():
        if not teacher.url and teacher.gpu_memory is None and gpu.is_usable():
            raise UserError(
                f"{key}.gpu_memory is not set, and vLLM takes {VLLM_FRACTION} of GPUs that trainer "
                "ranks are on: set the share that these and the policy's engines leave, or "
                f"{key}.url to servers on other GPUs",
                key=f"{key}.gpu_memory",
                cause=Cause.MISSING,
            )


def _suggest_placement(config: Config, hf_config: HFConfig) -> str:
    """Return the settings that `init` writes for this model on this host, as text."""
    if config.rollout.placement == "hosts":
        return "it to the share that the trainer leaves"
    general_hint = (
        "rollout.colocated: true and rollout.gpu_memory, what the trainer leaves of a GPU"
    )
    if torchrun.SPANS_NODES in os.environ:  # with GPUs of other hosts, too
        return general_hint
    try:
        node = detect_node_resources()
    except (OSError, subprocess.CalledProcessError):
        return general_hint
    if not node.num_gpus:  # the driver has some, but they have no files in /dev
        return general_hint
    guesses = guess_layout(hf_config, num_parameters(hf_config), node)
    keys = ", ".join(f"{guess.key}: {yaml_value_text(guess.value)}" for guess in guesses)
    return f"{keys}, as megatron-r1 init does on this host, or rollout.placement: hosts"


def check_rl_settings(config: Config) -> None:
    """Check the recipe's settings against each other, the model's config.json and this host.

    Raises:
        UserError: a setting that is impossible or unsupported.
    """
    if config.model.init != "load":
        raise UserError(
            "model.init: rl needs a model to start from; make one with sft, then load",
            key="model.init",
            cause=Cause.CONFLICT,
        )
    config.model.require_language_head()
    algorithms.find_algorithm(config.rl.algorithm)
    check_trainer(config, "rl")
    hf_config = read_hf_config(config.model.path)
    if config.rl.routing_replay:
        routing_shape(hf_config)
    # Layers without Transformer Engine need more; whether ranks have it only they know.
    check_divisions(hf_config, config.parallel, transformer_engine=True)
    check_engines(config, hf_config)
    check_local_engines(config.rollout)
    check_cpu_kernels(config.rollout, hf_config)
    check_folder_is_no_file(config)
    check_arguments(config.rollout, "rollout")
    check_room(config.rollout)
    check_pushes(config, hf_config, torchrun.world_size(config))
    if config.push.adapter_only and config.rollout.dtype == "float32" and gpu.is_usable():
        raise UserError(
            "push.adapter_only with rollout.dtype: float32: vLLM's LoRA kernels on GPUs compute in "
            "bfloat16 only; set rollout.dtype: bfloat16, or push.adapter_only: false",
            key="push.adapter_only",
            cause=Cause.UNSUPPORTED,
        )
    transport = config.push.transport
    if TRANSPORTS[transport].needs_gpu and not gpu.is_usable():
        raise UserError(
            f"push.transport: {transport} moves memory of GPUs, and there is none here; set shm, "
            "or gloo where engines are on other hosts",
            key="push.transport",
            cause=Cause.UNSUPPORTED,
        )
    check_teachers(config)
    check_sampling(config)
    check_gpu_memory(config, hf_config)
    if config.rollout.placement == "hosts":
        hosts_address(config.rollout)


def check_folder_is_no_file(config: Config) -> None:
    """Refuse a run folder that is a file; a dry run does not write into it.

    Raises:
        UserError: it is a file."""
    if Path(config.run.folder).is_file():
        raise UserError(
            f"run.folder {config.run.folder}: it is a file; choose another",
            key="run.folder",
            cause=Cause.MALFORMED,
        )


def check_sampling(config: Config) -> None:
    """Raise UserError for samples of a part of the vocabulary that the trainer cannot follow. Its
    softmax is over the tokens that the engine kept, whose ids come with each sampled one."""
    first_part, *_ = parts = config.schedule_parts()
    for step, part in parts:
        rollout, prefix = part.rollout, f"rl.schedule, from_step {step}: " if step > 1 else ""
        name = "top_p" if rollout.top_p < 1 else "min_p" if rollout.min_p else "top_k"
        key, setting = f"rollout.{name}", f"{prefix}rollout.{name}: {getattr(rollout, name)}"
        if rollout.uses_sampling_mask != first_part[1].rollout.uses_sampling_mask:
            raise UserError(
                f"{setting}: a batch may hold samples of both settings, and the trainer needs the "
                "kept tokens of all of them or of none: cut from the first step on, with "
                "rollout.top_k: the size of the vocabulary where nothing is to be left out",
                key=key,
                cause=Cause.CONFLICT,
            )
        if not rollout.uses_sampling_mask:
            continue
        if rollout.top_k is None:
            gap = f" (by up to {-math.log(rollout.top_p):.2g} in logprob_diff/mean)"
            raise UserError(
                f"{setting} draws from a part of the vocabulary. Log-probabilities over all of it "
                f"are not those of the samples{gap if rollout.top_p < 1 else ''}, so the trainer "
                "needs the tokens that the engine kept: set rollout.top_k, which bounds their "
                "number (4 bytes each); rollout.temperature below 1 sharpens samples without them. "
                "Evaluations have eval.top_p",
                key=key,
                cause=Cause.MISSING,
            )
        if rollout.min_p and rollout.speculative.method != "none":
            raise UserError(
                f"{setting}: vLLM verifies drafts without min_p; use rollout.top_p, or leave out "
                "rollout.speculative",
                key="rollout.min_p",
                cause=Cause.CONFLICT,
            )
