"""The settings of one engine, and the command line and environment with which vLLM is started."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_r1.base.processes import process_memory
from megatron_r1.base.transports import BACKEND_PREFIX, TRANSPORTS
from megatron_r1.engines.server.environment_variables import engine_environment, network_environment
from megatron_r1.engines.server.vllm_arguments import argument_list

SERVER_MODULE = "megatron_r1.engines.plugin.serve"
"""What an engine's process runs."""
MIDDLEWARE = "megatron_r1.engines.plugin.serve.SecretMiddleware"
SECRET_VARIABLE = "VLLM_API_KEY"
"""Environment variable from which vLLM, and `SecretMiddleware`, read an engine's secret."""


class EnginePart(msgspec.Struct, frozen=True):
    """One host's part of an engine that spans several hosts: an equal share of its data-parallel
    copies. Tensor and pipeline ranks of a copy stay on one host.

    This is vLLM's own way of doing it (`--headless`): the first part has the API server and the
    coordinator, where the ranks of all parts meet.

    Attributes:
        index: the part, counted from 0.
        count: the number of parts, one for each host.
        coordinator: the coordinator's address, as host:port, which the first part chooses when it
            starts."""

    index: int
    count: int
    coordinator: str = ""

    @property
    def serves(self) -> bool:
        """Whether the part has the API server."""
        return self.index == 0

    def copies(self, data_parallel: int) -> int:
        """Return how many of an engine's `data_parallel` copies the part runs."""
        assert data_parallel % self.count == 0, f"{data_parallel} copies on {self.count} hosts"
        return data_parallel // self.count

    def arguments(self, data_parallel: int, coordinator: str) -> list[str]:
        """Return vLLM's arguments for a part, which an engine of `data_parallel` copies on one host
        does not need."""
        host, _, port = coordinator.rpartition(":")
        copies = self.copies(data_parallel)
        return [
            "--data-parallel-size-local",
            str(copies),
            "--data-parallel-address",
            host,
            "--data-parallel-rpc-port",
            port,
            *([] if self.serves else ["--headless"]),
            *([] if self.serves else ["--data-parallel-start-rank", str(self.index * copies)]),
        ]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of one engine, or of the part of an engine that one host runs.

    Attributes:
        device: what the engine computes on.
        dtype: the dtype of weights, activations and KV cache.
        max_model_len: prompt plus response, tokens.
        max_num_seqs: sequences decoded together, by each of `data_parallel` copies.
        seed: vLLM's seed of the engine; requests have their own.
        num_threads: OpenMP threads of all ranks together (CPU only).
        kv_cache_gib: memory of a rank for keys and values (CPU only).
        kv_block_tokens: tokens of a block of that memory; None for vLLM's default. With latent
            attention a block on a CPU has 16 tokens, whatever this setting is.
        prefix_caching: share the prompt's keys and values within a group. vLLM turns it off for MLA
            on CPU.
        weight_transfer_backend: a name registered by `engines.plugin`.
        return_routing: add the experts of every token to each response (a model with experts only).
            On a GPU vLLM has this in its second model runner and with prefix caching; on a CPU
            `engines.plugin.cpu_routed_experts` adds it, without.
        return_sampling_mask: add the tokens that the sampler kept to responses with a top_k. On a
            GPU vLLM has this in its second model runner; on a CPU `engines.plugin.sampling_masks`
            adds it.
        tensor_parallel: ranks that share every layer's matrices.
        pipeline_parallel: stages of layers, each on ranks of its own.
        data_parallel: copies of the model, as `RolloutConfig.data_parallel`.
        expert_parallel: whether routed experts are spread whole over tensor_parallel x
            data_parallel ranks.
        redundant_experts: copies of experts that vLLM's balancer places (GPU only).
        gpu_memory: share of each GPU's memory that the engine takes (GPU only); None for vLLM's
            default.
        plain_matrices: leave matrices unpacked, which speeds up pushes and slows down generation
            (CPU only; `engines.plugin.cpu_patches`).
        enable_sleep_mode: whether the engine can free its memory and allocate it again (GPU only).
        speculative: vLLM's `speculative_config`; None for no speculation.
        secret: bearer token that every call except `/health` needs; empty for none.
        host: address to listen at.
        port: None for any free port.
        part: the part of the engine that runs here; None for the whole engine.
        lora: vLLM's arguments for an adapter that is pushed; None for whole weights.
        hf_overrides: keys that replace those of the model's config.json.
        vllm: further arguments of vLLM, by name (`engines.server.vllm_arguments`).
        extra_args: arguments that vLLM gets unchanged; they override the other settings.
        extra_env: variables of vLLM's environment; they override the others.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 256
    seed: int = 0
    num_threads: int = 2
    kv_cache_gib: int = 1
    kv_block_tokens: int | None = None
    prefix_caching: bool = True
    weight_transfer_backend: str = BACKEND_PREFIX + "shm"
    return_routing: bool = False
    return_sampling_mask: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0
    gpu_memory: float | None = None
    plain_matrices: bool = False
    enable_sleep_mode: bool = False
    speculative: Mapping[str, Any] | None = None
    secret: str = ""
    host: str = "127.0.0.1"
    port: int | None = None
    part: EnginePart | None = None
    lora: Mapping[str, Any] | None = None
    hf_overrides: Mapping[str, Any] | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)
    extra_args: Sequence[str] = ()
    extra_env: Mapping[str, str] | None = None

    def arguments(self, model: Path) -> list[str]:
        """Return vLLM's arguments, except the port and the arguments of a part."""
        is_cpu = self.device == "cpu"
        fraction = None if is_cpu else self.gpu_memory
        prefix_caching = not is_cpu if self.return_routing else self.prefix_caching
        return [
            "--model",
            str(model),
            "--served-model-name",
            "policy",
            "--host",
            self.host,
            "--dtype",
            self.dtype,
            "--max-model-len",
            str(self.max_model_len),
            "--max-num-seqs",
            str(self.max_num_seqs),
            "--seed",
            str(self.seed),
            "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
            *(["--block-size", str(self.kv_block_tokens)] if self.kv_block_tokens else []),
            "--weight-transfer-config",
            json.dumps({"backend": self.weight_transfer_backend}),
            "--logprobs-mode",
            "processed_logprobs",
            "--generation-config",
            "vllm",
            "--enable-scale-out",
            "--skip-tokenizer-init",
            "--disable-uvicorn-access-log",
            *(["--enforce-eager"] if is_cpu else []),
            # On a GPU the watchdog sees by the statistics that a long response grows; a step on a
            # CPU is too short to pay for them, unless they count accepted drafts.
            *(["--disable-log-stats"] if is_cpu and not self.speculative else []),
            *(["--speculative-config", json.dumps(self.speculative)] if self.speculative else []),
            # Latent attention on a CPU verifies drafts as prompts, whose lengths it takes from the
            # host; scheduled ahead, those would count drafts that are rejected later.
            *(["--no-async-scheduling"] if is_cpu and self.speculative else []),
            *(["--enable-return-routed-experts"] if self.return_routing else []),
            *(["--return-sampling-mask"] if self.return_sampling_mask else []),
            *(["--enable-sleep-mode"] if self.enable_sleep_mode and not is_cpu else []),
            *(["--gpu-memory-utilization", f"{fraction}"] if fraction else []),
            *(("--additional-config", '{"plain_matrices": true}') if self.plain_matrices else ()),
            "--tensor-parallel-size",
            str(self.tensor_parallel),
            "--pipeline-parallel-size",
            str(self.pipeline_parallel),
            "--data-parallel-size",
            str(self.data_parallel),
            *(["--enable-expert-parallel"] if self.expert_parallel else []),
            *(["--middleware", MIDDLEWARE] if self.secret else []),
            *argument_list(self.lora or {}),
            *argument_list(self._vllm_arguments()),
            *self.extra_args,
        ]

    def _vllm_arguments(self) -> dict[str, Any]:
        """Return `vllm`, with the balancer of redundant experts."""
        if not self.redundant_experts:
            return dict(self.vllm)
        balancer: dict[str, Any] = {"num_redundant_experts": self.redundant_experts}
        balancer = {**self.vllm.get("eplb_config", {}), **balancer}
        if self.enable_sleep_mode:
            # Where it is installed vLLM takes nixl, which registers the weights' memory with the
            # network adapter once; a sleep gives that memory away.
            balancer.setdefault("communicator", "torch_gloo")
        return {**self.vllm, "enable_eplb": True, "eplb_config": balancer}

    def environment(self) -> dict[str, str]:
        """Return the environment variables that are set in addition to this process's, or replace
        them.

        Raises:
            OSError: `host` does not resolve.
        """
        copies = self.part.copies(self.data_parallel) if self.part else self.data_parallel
        ranks = self.tensor_parallel * self.pipeline_parallel * copies
        threads = max(1, self.num_threads // ranks)
        environment = engine_environment(self.device, threads, self.kv_cache_gib)
        if (self.return_routing or self.return_sampling_mask) and self.device != "cpu":
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        transport = TRANSPORTS[self.weight_transfer_backend.removeprefix(BACKEND_PREFIX)]
        if self.device != "cpu" and transport.exports_gpu_memory:
            environment |= process_memory.exporting_engine_allocator(os.environ)
        if self.part is not None:
            environment |= network_environment(self.host)
        # The secret also where it is empty: the user's own VLLM_API_KEY is not for our engines.
        return environment | {SECRET_VARIABLE: self.secret} | dict(self.extra_env or {})
