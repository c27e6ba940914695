"""What the sections `rollout` and `teacher` share: the settings of vLLM engines."""

from typing import Any, Literal

from pydantic import Field

from megatron_r1.config.section import Resumable, Section

LAYOUT_KEYS = {"tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel"}
"""The keys that say how an engine's ranks divide the model."""


class EngineConfig(Section):
    """Settings that the engines of rollouts and of a teacher share."""

    tensor_parallel: Resumable[int] = Field(1, ge=1)
    """ranks of an engine that share every layer"""
    pipeline_parallel: Resumable[int] = Field(1, ge=1)
    """stages of layers in an engine"""
    data_parallel: Resumable[int] = Field(1, ge=1)
    """copies of tensor_parallel x pipeline_parallel ranks behind one engine's address"""
    expert_parallel: Resumable[bool] = False
    """spread routed experts whole over tensor_parallel x data_parallel ranks; else each is split"""
    gpu_memory: Resumable[float | None] = Field(None, gt=0, le=1)
    """share of its GPU's memory that an engine takes; default: vLLM's own"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of an engine's weights and products"""
    kv_cache_gib: int = Field(1, gt=0)
    """KV cache on a CPU, GiB"""
    threads: Resumable[int | None] = Field(None, ge=1)
    """CPU threads per engine; default: 2, and 1 on a machine of 2 cores"""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """limit for an engine to load its weights and answer"""
    request_timeout_seconds: float = Field(3600.0, gt=0)
    """limit for one request"""
    max_restarts: Resumable[int] = Field(10, ge=0)
    """how many dead, slow or garbling engines a command replaces; a death after that stops the
    run"""
    unresponsive_seconds: Resumable[float] = Field(120.0, gt=0)
    """an engine that has not answered for so long counts as dead"""
    vllm: Resumable[dict[str, Any]] = {}
    """further arguments of `vllm serve`, by their names: {kv_cache_dtype: fp8, all2all_backend:
    deepep_low_latency, compilation_config: {cudagraph_mode: FULL}}; vLLM's parser checks them
    before anything starts. See docs/engines.md"""
