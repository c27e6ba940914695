"""Checks of a recipe's engines (`rollout`, `teacher`) against the model, before vLLM starts."""

import sys
from importlib.util import find_spec

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, RolloutConfig
from megatron_r1.config.teacher import TeacherEngineConfig
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.environment_variables import check_fp8_scales, compiler_environment
from megatron_r1.engines.server.vllm_arguments import check_reserved
from megatron_r1.models.families import FAMILIES
from megatron_r1.models.hf_config import (
    HFConfig,
    language_settings,
    padded_vocabulary,
    require_values,
    sparse_layers,
)
from megatron_r1.models.hf_config_names import resolve_aliases


def check_engines(config: Config, hf_config: HFConfig) -> None:
    """Raise UserError for settings with which no rollout engine can serve the model.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`, of any architecture.
    """
    rollout = config.rollout
    check_ranks(rollout, hf_config, "rollout")
    if config.rl.routing_replay and rollout.pipeline_parallel > 1:
        raise UserError(
            f"rollout.pipeline_parallel={rollout.pipeline_parallel}: vLLM returns the experts of "
            "one stage only; set "
            "rl.routing_replay: false, or rollout.pipeline_parallel: 1",
            key="rollout.pipeline_parallel",
            cause=Cause.CONFLICT,
        )
    if config.push.fp8:
        check_fp8_scales(hf_config)
    _check_redundant_experts(rollout, hf_config)
    _check_speculation(rollout, hf_config)


def _check_redundant_experts(rollout: RolloutConfig, hf_config: HFConfig) -> None:
    """Raise UserError for copies of experts that engines cannot have."""
    copies, key = rollout.redundant_experts, "rollout.redundant_experts"
    ranks = rollout.tensor_parallel * rollout.data_parallel
    if not copies:
        return
    if not rollout.expert_parallel or ranks == 1:
        raise UserError(
            f"{key}: {copies} copies are spread over the ranks of an engine, and "
            f"rollout.expert_parallel is {str(rollout.expert_parallel).lower()} on {ranks} of them "
            "(rollout.tensor_parallel x rollout.data_parallel); set it to true on several, or "
            "the copies to 0",
            key=key,
            cause=Cause.CONFLICT,
        )
    if rollout.colocated and rollout.vllm.get("eplb_config", {}).get("communicator") == "nixl":
        raise UserError(
            "rollout.vllm.eplb_config.communicator: nixl registers the weights' memory once, and "
            "engines that sleep (rollout.colocated) give it away; leave it out, or set torch_gloo",
            key="rollout.vllm.eplb_config.communicator",
            cause=Cause.CONFLICT,
        )
    if (experts := num_experts(hf_config)) and (experts + copies) % ranks:
        raise UserError(
            f"{key}: {experts} experts and {copies} copies cannot be divided among {ranks} ranks "
            f"(rollout.tensor_parallel x rollout.data_parallel); {-experts % ranks} or "
            f"{-experts % ranks + ranks} "
            "copies can",
            key=key,
            cause=Cause.INDIVISIBLE,
        )


def check_local_engines(rollout: RolloutConfig) -> None:
    """Refuse engines on this host that lack a package or a GPU.

    Not part of `check_engines`: a plan and a rehearsal of a recipe for GPUs need nothing.

    Args:
        rollout: the recipe's section.

    Raises:
        UserError: vLLM or DeepEP is not installed, the CUDA toolkit cannot compile, or there are
            no GPUs for vLLM's balancer of experts.
    """
    if rollout.placement != "local":
        return
    if not find_spec("vllm"):
        raise UserError(
            f"vllm is not installed in {sys.prefix}: install the version of requirements/cpu.lock "
            "or requirements/cuda.lock there, or run engines on other hosts (rollout.placement: "
            "hosts)",
            key="rollout.placement",
            cause=Cause.NOT_INSTALLED,
        )
    if gpu.is_usable():
        compiler_environment()
    elif rollout.redundant_experts:
        raise UserError(
            "rollout.redundant_experts: vLLM's balancer of experts needs GPUs, and there is none "
            "here; set it to 0",
            key="rollout.redundant_experts",
            cause=Cause.UNSUPPORTED,
        )
    key = "rollout.vllm.all2all_backend"
    exchange = str(rollout.vllm.get("all2all_backend") or rollout.vllm.get("all2all-backend"))
    if exchange.startswith("deepep") and not find_spec("deep_ep"):
        raise UserError(
            f"{key}: {exchange} needs the package deep_ep, which is not installed here: see "
            "docs/gpu.md, or set allgather_reducescatter",
            key=key,
            cause=Cause.NOT_INSTALLED,
        )


def num_experts(hf_config: HFConfig) -> int:
    """Return the routed experts of a layer of the model of config.json `hf_config`, 0 without
    any."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")  # by architecture
    return next((count for name in names if (count := language_settings(hf_config).get(name))), 0)


def _check_speculation(rollout: RolloutConfig, hf_config: HFConfig) -> None:
    """Check that vLLM can draft for the model.

    Args:
        rollout: the section `rollout`.
        hf_config: the `config.json` of the model, of any architecture.

    Raises:
        UserError: drafts that vLLM cannot make for the model."""
    method, tokens = rollout.speculative.method, rollout.speculative.tokens
    if method == "suffix" and rollout.placement == "local" and not find_spec("arctic_inference"):
        raise UserError(
            "rollout.speculative.method: suffix needs a package that is not installed here: pip "
            "install arctic-inference==0.1.1, or set method: ngram",
            key="rollout.speculative.method",
            cause=Cause.NOT_INSTALLED,
        )
    if method != "mtp":
        return
    language = language_settings(hf_config)
    # By architecture: DeepSeek-V3 and its relatives, Qwen3.5.
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
    layers = next((count for key in keys if (count := language.get(key))), 0)
    if not layers:
        raise UserError(
            "rollout.speculative.method: mtp drafts with the model's MTP layers, and its "
            f"config.json has none ({keys[0]}); set method: ngram, or none",
            key="rollout.speculative.method",
            cause=Cause.CONFLICT,
        )
    if rollout.pipeline_parallel > 1:
        raise UserError(
            "rollout.speculative.method: mtp with "
            f"rollout.pipeline_parallel={rollout.pipeline_parallel}: a drafter "
            "behind stages has not been tried; set rollout.pipeline_parallel: 1, or method: ngram",
            key="rollout.speculative.method",
            cause=Cause.UNSUPPORTED,
        )
    if tokens > layers and tokens % layers:
        raise UserError(
            f"rollout.speculative.tokens: {tokens} is no multiple of the model's {layers} MTP "
            "layers, which draft in turn; choose one",
            key="rollout.speculative.tokens",
            cause=Cause.INDIVISIBLE,
        )


def check_ranks(
    engines: RolloutConfig | TeacherEngineConfig, hf_config: HFConfig, section: str
) -> None:
    """Raise UserError for engines whose ranks cannot share the model.

    Args:
        engines: the recipe's section.
        hf_config: the model's `config.json`.
        section: the section of the recipe that has the settings.
    """
    check_reserved(engines, section)
    language = language_settings(hf_config)
    heads = language.get("num_attention_heads", engines.tensor_parallel)
    kv_heads = language.get("num_key_value_heads") or heads
    if heads % engines.tensor_parallel:
        raise UserError(
            f"{section}.tensor_parallel={engines.tensor_parallel} does not divide "
            f"num_attention_heads={heads}; "
            "choose a divisor",
            key=f"{section}.tensor_parallel",
            cause=Cause.INDIVISIBLE,
        )
    has_latent_attention = bool(language.get("kv_lora_rank"))
    if (
        not has_latent_attention
        and kv_heads % engines.tensor_parallel
        and engines.tensor_parallel % kv_heads
    ):
        raise UserError(
            f"{section}.tensor_parallel={engines.tensor_parallel} neither divides "
            f"num_key_value_heads={kv_heads} nor "
            "is a multiple of it; choose one that does",
            key=f"{section}.tensor_parallel",
            cause=Cause.INDIVISIBLE,
        )
    rows = padded_vocabulary(language.get("vocab_size", 0))
    if rows % engines.tensor_parallel:
        raise UserError(
            f"{section}.tensor_parallel={engines.tensor_parallel} does not divide the {rows} "
            "rows of vLLM's padded "
            "vocabulary; choose a divisor",
            key=f"{section}.tensor_parallel",
            cause=Cause.INDIVISIBLE,
        )
    if "GptOssForCausalLM" in (language.get("architectures") or ()):
        _check_gpt_oss(engines, language, section)
    if "DeepseekV3ForCausalLM" in (language.get("architectures") or ()):
        # Where they are absent, the engine gets them (`EngineServer`).
        require_values(language, **FAMILIES["DeepseekV3"].implied_values)
    _check_sparse(hf_config)
    layers = language.get("num_hidden_layers", engines.pipeline_parallel)
    if engines.pipeline_parallel > layers:
        raise UserError(
            f"{section}.pipeline_parallel={engines.pipeline_parallel} is more than the model's "
            f"{layers} layers; "
            "lower it",
            key=f"{section}.pipeline_parallel",
            cause=Cause.TOO_LARGE,
        )
    if engines.expert_parallel:
        _check_expert_ranks(engines, language, section)


def _check_expert_ranks(
    engines: RolloutConfig | TeacherEngineConfig, language: HFConfig, section: str
) -> None:
    experts = num_experts(language)
    if not experts:
        raise UserError(
            f"{section}.expert_parallel: the model has no experts; set it to false",
            key=f"{section}.expert_parallel",
            cause=Cause.CONFLICT,
        )
    ranks = engines.tensor_parallel * engines.data_parallel
    if ranks > experts:
        raise UserError(
            f"{section}.expert_parallel: {ranks} ranks ({section}.tensor_parallel x "
            f"{section}.data_parallel) for "
            f"{experts} experts leave some with none; use more {section}.engines of fewer ranks",
            key=f"{section}.expert_parallel",
            cause=Cause.TOO_LARGE,
        )


def _check_sparse(hf_config: HFConfig) -> None:
    """Raise UserError for a mixture of experts whose layers are all dense: vLLM's class needs one
    layer with experts (models/glm4_moe.py:509, models/qwen3_moe.py:607, vLLM 0.32)."""
    classes = {"Glm4MoeForCausalLM", "Qwen3MoeForCausalLM"}
    names = classes.intersection(hf_config.get("architectures") or ())
    if names and not any(sparse_layers(resolve_aliases(hf_config))):
        keys = ("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step", "num_experts")
        sparse_keys = ", ".join(f"{key}={hf_config[key]}" for key in keys if hf_config.get(key))
        raise UserError(
            f"config.json: no layer has experts ({sparse_keys or 'none are given'}), and vLLM's "
            f"class of {', '.join(names)} needs one: no engine can sample from this model",
            key="config.json",
            cause=Cause.UNSUPPORTED,
        )


def _check_gpt_oss(
    engines: RolloutConfig | TeacherEngineConfig, hf_config: HFConfig, section: str
) -> None:
    """Raise UserError for ranks among which vLLM's class of gpt-oss cannot divide the model.

    A tensor rank needs key-value heads of its own, every rank an equal part of intermediate_size.
    """
    kv_heads, intermediate_size = hf_config["num_key_value_heads"], hf_config["intermediate_size"]
    if kv_heads % engines.tensor_parallel:
        raise UserError(
            f"{section}.tensor_parallel={engines.tensor_parallel} does not divide "
            f"num_key_value_heads={kv_heads}, "
            "which vLLM's gpt-oss cannot share among ranks; choose a divisor",
            key=f"{section}.tensor_parallel",
            cause=Cause.INDIVISIBLE,
        )
    ranks = engines.tensor_parallel * engines.pipeline_parallel * engines.data_parallel
    if intermediate_size % ranks:
        raise UserError(
            f"{section}: {ranks} ranks (tensor_parallel x pipeline_parallel x data_parallel) do "
            "not divide intermediate_size="
            f"{intermediate_size}, as vLLM's gpt-oss requires; choose a divisor",
            key=section,
            cause=Cause.INDIVISIBLE,
        )
