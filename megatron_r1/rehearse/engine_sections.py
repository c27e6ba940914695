"""The engines in miniature: the sections `rollout` and `teacher`."""

import math
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.config.teacher import TeacherEngineConfig
from megatron_r1.data.prompt_templates import TEMPLATES
from megatron_r1.rehearse import layout
from megatron_r1.rehearse.settings import RehearsalDevice

ENGINE_AXES = ("tensor_parallel", "data_parallel", "pipeline_parallel", "engines")
"""Settings whose product is the ranks of all engines, in the order in which they become 1."""
RESPONSE_TOKENS = 24
"""Most tokens of a miniature's response."""
PROMPT_TOKENS = 208
"""Room for a prompt in the longest of our templates."""
QUESTION_TOKENS = 32
"""Room for a question."""
CPU_ROLLOUT = {"vllm": {}, "redundant_experts": 0}
"""Arguments of vLLM are of kernels, graphs and sizes of GPUs; its balancer needs GPUs."""
OMITTED_ARGUMENTS = ("all2all_backend", "kv_cache_dtype", "compilation_config", "moe_backend")
"""Arguments of vLLM that choose graphs, which a null GPU has not, or among kernels."""
IMITATED_EXCHANGES = ("allgather_reducescatter",)
"""Expert exchanges of vLLM that a null GPU executes: those by NCCL's collectives."""
IMITATED_CACHES = ("auto", "bfloat16")
BALANCER_OPTIONS = {"window_size": 8, "step_interval": 8}
"""vLLM's balancer counts tokens of experts in so many steps, and moves experts after as many: a
response of a miniature takes 24."""


def small_rollout_settings(config: Config) -> dict[str, Any]:
    """Return the settings of `rollout` that differ on any device."""
    rollout = config.rollout
    hosts = min(rollout.hosts_per_engine, layout.MAX_PARTS)
    return {
        "engines": min(rollout.engines, layout.MAX_PARTS),
        "tensor_parallel": min(rollout.tensor_parallel, layout.MAX_PARTS),
        "data_parallel": min(rollout.data_parallel, layout.MAX_PARTS),
        "pipeline_parallel": min(rollout.pipeline_parallel, layout.MAX_PARTS),
        "hosts_per_engine": hosts,
        "hosts_address": "127.0.0.1" if rollout.placement == "hosts" else None,
        "hosts_port": 0,
        "max_response_tokens": response_tokens(config, rollout.max_response_tokens),
        "max_model_len": miniature_model_len(config),
        "max_num_seqs": min(rollout.max_num_seqs, 16),
        "gpu_memory": None,
        "threads": 1,
        "start_timeout_seconds": 1200.0,
        "host_silence_seconds": 120.0,
    }


def miniature_model_len(config: Config) -> int:
    """Return the most tokens of a prompt with its response: in a template of the recipe's own, at
    most one for each byte."""
    templates = config.data.template, config.reward_model.template or ""
    template_bytes = max(len(text.encode()) for text in templates if text not in TEMPLATES)
    return max(PROMPT_TOKENS, template_bytes + QUESTION_TOKENS) + RESPONSE_TOKENS


def response_tokens(config: Config, tokens: int) -> int:
    """Return the miniature of a limit: the longest of the schedule is `RESPONSE_TOKENS`.

    Args:
        config: the recipe.
        tokens: its limit, of one part of the schedule."""
    longest = max(part.rollout.max_response_tokens for _, part in config.schedule_parts())
    return max(1, RESPONSE_TOKENS * tokens // longest)


def rollout_on_gpus(
    config: Config, num_gpus: int, experts: int, device: RehearsalDevice
) -> dict[str, Any]:
    """Return what differs for engines on GPUs: the recipe's share of them, its arguments of vLLM,
    and no more ranks than trainer ranks have GPUs.

    Args:
        config: the recipe.
        num_gpus: the trainer ranks of the miniature.
        experts: the routed experts of a layer of its model.
        device: "gpu" or "null-gpu"."""
    small_rollout, sizes = small_rollout_settings(config), {}
    while math.prod(small_rollout[axis] for axis in ENGINE_AXES) > num_gpus:
        # Experts are spread by the data axis, too; several engines are what a push is most for.
        axes = [axis for axis in ENGINE_AXES if small_rollout[axis] > 1]
        kept_axis = (
            "data_parallel" if config.rollout.expert_parallel and "data_parallel" in axes else ""
        )
        left_out = next((axis for axis in axes if axis != kept_axis), axes[0])
        small_rollout[left_out] = sizes[left_out] = 1
    hosts = min(small_rollout["hosts_per_engine"], small_rollout["data_parallel"])
    num_copies = layout.redundant_experts(config.rollout.model_copy(update=small_rollout), experts)
    return {
        "gpu_memory": config.rollout.gpu_memory,
        **sizes,
        "hosts_per_engine": hosts,
        "redundant_experts": num_copies,
        "vllm": _vllm_arguments(config, num_copies, device),
    }


def _vllm_arguments(config: Config, num_copies: int, device: RehearsalDevice) -> dict[str, Any]:
    """Return the recipe's arguments of vLLM. On a null GPU they are without kernels that it does
    not imitate; prompts are in two parts where the recipe divides them, and experts are moved."""
    arguments = dict(config.rollout.vllm)
    if device == "null-gpu":
        arguments = {
            name: value for name, value in arguments.items() if name not in OMITTED_ARGUMENTS
        }
        if config.rollout.vllm.get("all2all_backend") in IMITATED_EXCHANGES:
            arguments["all2all_backend"] = config.rollout.vllm["all2all_backend"]
        if config.rollout.vllm.get("kv_cache_dtype") in IMITATED_CACHES:
            arguments["kv_cache_dtype"] = config.rollout.vllm["kv_cache_dtype"]
    if "max_num_batched_tokens" in arguments:
        tokens = min(arguments["max_num_batched_tokens"], miniature_model_len(config) // 2)
        arguments["max_num_batched_tokens"] = tokens
    if num_copies:
        arguments["eplb_config"] = {**arguments.get("eplb_config", {}), **BALANCER_OPTIONS}
    else:
        arguments.pop("eplb_config", None)
    return arguments


def small_teacher_settings(config: Config, folder: Path) -> dict[str, Any]:
    """Return the settings of `teacher` that differ, one small model for each; {} without a teacher.

    Args:
        config: the recipe.
        folder: the folder that the models are in."""
    if not config.teacher.path:
        return {}
    by_source = {
        source: teacher.model_dump() | _teacher_engines(teacher, folder / f"teacher-{number}")
        for number, (source, teacher) in enumerate(config.teacher.by_source.items())
    }
    return _teacher_engines(config.teacher, folder / "teacher") | {"by_source": by_source}


def _teacher_engines(teacher: TeacherEngineConfig, folder: Path) -> dict[str, Any]:
    """Return the settings that differ for one teacher, with its model in `folder`."""
    return {
        "path": str(folder),
        "url": [],
        "engines": 1,
        "tensor_parallel": min(teacher.tensor_parallel, layout.MAX_PARTS),
        "threads": 1,
        "start_timeout_seconds": 1200.0,
    }
