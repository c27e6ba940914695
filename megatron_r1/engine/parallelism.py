"""How the ranks of an engine share a model, refused early where vLLM would refuse it late."""

from __future__ import annotations

import os
from typing import Any

from megatron_r1.config import Config, RolloutConfig, TeacherConfig

LAYOUT = {"tensor", "pipeline", "data", "expert_parallel"}
ENGINE = LAYOUT | {"dtype", "max_num_seqs", "kv_cache_gib", "gpu_memory", "plain_matrices"}
SUPERVISION = {
    "start_timeout_seconds",
    "request_timeout_seconds",
    "max_restarts",
    "unresponsive_seconds",
}
"""Keys that a recipe's engines and its teacher have both."""


def fleet_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """How a recipe wants its engines supervised: arguments of `RolloutFleet`."""
    return engines.model_dump(include=SUPERVISION)


def engine_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """`EngineSettings` that a recipe has, the same for every job of its engines."""
    # The server that takes requests, and the controller, need a core besides: with 2 threads on 2
    # cores a rollout of 256 short answers takes 1.14 s, with 1 thread 0.92 s.
    threads = engines.threads or max(1, min(2, (os.cpu_count() or 1) - 1))
    return engines.model_dump(include=ENGINE) | {"num_threads": threads}


def check_engines(config: Config, hf: dict) -> None:
    """Refuse what no rollout engine can serve, of any model whose `config.json` is `hf`.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    rollout = config.rollout
    check_ranks(rollout, hf, "rollout")
    if config.rl.routing_replay and rollout.pipeline > 1:
        raise ValueError(
            f"rollout.pipeline={rollout.pipeline}: vLLM returns the experts of one stage only; set "
            "rl.routing_replay: false, or rollout.pipeline: 1"
        )


def check_ranks(engines: RolloutConfig | TeacherConfig, hf: dict, section: str) -> None:
    """Refuse engines whose ranks cannot share the model. section: of the recipe, for the error.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    language = hf.get("text_config") or hf
    heads = language.get("num_attention_heads", engines.tensor)
    kv_heads = language.get("num_key_value_heads") or heads
    if heads % engines.tensor:
        raise ValueError(
            f"{section}.tensor={engines.tensor} does not divide num_attention_heads={heads}; "
            "choose a divisor"
        )
    latent = bool(language.get("kv_lora_rank"))
    if not latent and kv_heads % engines.tensor and engines.tensor % kv_heads:
        raise ValueError(
            f"{section}.tensor={engines.tensor} neither divides num_key_value_heads={kv_heads} nor "
            "is a multiple of it; choose one that does"
        )
    layers = language.get("num_hidden_layers", engines.pipeline)
    if engines.pipeline > layers:
        raise ValueError(
            f"{section}.pipeline={engines.pipeline} is more than the model's {layers} layers; "
            "lower it"
        )
    experts = num_experts(language)
    if engines.expert_parallel and not experts:
        raise ValueError(f"{section}.expert_parallel: the model has no experts; set it to false")
    ranks = engines.tensor * engines.data
    if engines.expert_parallel and ranks > experts:
        raise ValueError(
            f"{section}.expert_parallel: {ranks} ranks ({section}.tensor x {section}.data) for "
            f"{experts} experts leave some with none; use more {section}.engines of fewer ranks"
        )


def num_experts(language: dict) -> int:
    """Routed experts of a model, by the names that architectures have for them; 0: it is dense."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    return next((count for name in names if (count := language.get(name))), 0)
