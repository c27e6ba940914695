"""Which GPUs of this host trainer ranks and engines share.

Trainer ranks take the first GPUs, engines that run on the controller's host equal shares of all
(`engines.server.gpu`): both are on the same GPUs. `commands.recipe_sizes.layout` decides the
placement that `init` writes, and that a recipe without one is refused with."""

import os
import subprocess
from collections.abc import Mapping
from typing import Any

import psutil

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands import torchrun
from megatron_r1.commands.recipe_sizes import Machine, layout
from megatron_r1.commands.recipe_text import value_text
from megatron_r1.config import Config
from megatron_r1.engines.server import gpu
from megatron_r1.models.weights import num_parameters

VLLM_SHARE = 0.92
"""vLLM's default of --gpu-memory-utilization (config/cache.py)."""


def this_machine() -> Machine:
    """Return the machine that this process runs on. Raises OSError, CalledProcessError where
    nvidia-smi does not run."""
    if not gpu.is_usable():
        return Machine(0, psutil.virtual_memory().available)
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    sizes_mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return Machine(len(gpu.visible_gpus(os.environ)), min(map(int, sizes_mib)) * 2**20)


def engines_share_gpus(config: Config) -> bool:
    """Whether the policy's engines are on GPUs of trainer ranks."""
    local = config.rollout.placement == "local"
    return gpu.is_usable() and (local or config.rollout.colocated)


def check_gpu_memory(config: Config, hf: Mapping[str, Any]) -> None:
    """Raise UserError for engines that take vLLM's share of GPUs, nearly all, where
    trainer ranks are on them. hf: the model's config.json."""
    rollout, teacher = config.rollout, config.teacher
    taken = f"gpu_memory is not set, and vLLM takes {VLLM_SHARE} of GPUs that trainer ranks are on"
    if engines_share_gpus(config) and rollout.gpu_memory is None:
        raise UserError(
            f"rollout.{taken}: set {_placement(config, hf)}; megatron-r1 plan prints the largest "
            "share",
            key="rollout.gpu_memory" if rollout.colocated else "rollout.colocated",
            cause=Cause.MISSING if rollout.colocated else Cause.CONFLICT,
        )
    if teacher.path and not teacher.url and teacher.gpu_memory is None and gpu.is_usable():
        raise UserError(
            f"teacher.{taken}: set the share that these and the policy's engines leave, or "
            "teacher.url to servers on other GPUs",
            key="teacher.gpu_memory",
            cause=Cause.MISSING,
        )


def _placement(config: Config, hf: Mapping[str, Any]) -> str:
    """Return the settings that `init` writes for this model on this host, as text."""
    if config.rollout.placement == "hosts":
        return "it to the share that the trainer leaves"
    unknown = "rollout.colocated: true and rollout.gpu_memory, what the trainer leaves of a GPU"
    if torchrun.SPANS_HOSTS in os.environ:  # with GPUs of other hosts, too
        return unknown
    try:
        machine = this_machine()
    except (OSError, subprocess.CalledProcessError):
        return unknown
    if not machine.gpus:  # the driver has some, but they have no files in /dev
        return unknown
    guesses = layout(dict(hf), num_parameters(dict(hf)), machine)
    keys = ", ".join(f"{guess.key}: {value_text(guess.value)}" for guess in guesses)
    return f"{keys}, as megatron-r1 init does on this host, or rollout.placement: hosts"
