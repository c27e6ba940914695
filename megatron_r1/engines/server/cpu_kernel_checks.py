"""Check of a model against the sizes that vLLM's kernels for CPUs have.

Without it an engine ends at its start, or at its first prompt, with a message that names no key of
`config.json`. Lines are of vLLM 0.32."""

import os

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.server import gpu
from megatron_r1.models.hf_config import ARCHITECTURES, HFConfig, model_family, sparse_layers
from megatron_r1.models.hf_config_names import resolve_aliases

HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""v1/attention/backends/cpu_attn.py:70 (`get_supported_head_sizes`), and 48, which is computed too:
log-probabilities equal transformers'; 16, 24, 40, 144, 176 and 288 end the engine."""
LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""v1/attention/backends/mla/cpu_mla.py:24."""
CPU_EXPERT_ALIGNMENT = 32
"""model_executor/layers/fused_moe/experts/cpu_moe.py:112 (`_supports_grouped_gemm`): of the hidden
size and, where it is not padded, of a rank's part of an expert."""
SIZE_REMEDY = "use a machine with a GPU, or a model of another size"


def check_cpu_kernels(rollout: RolloutConfig, hf_config: HFConfig) -> None:
    """Raise UserError for a model that engines on this host, which has no GPU, cannot compute.

    Args:
        rollout: the recipe's section.
        hf_config: any `config.json`; one of an architecture that is not known here is not checked.
    """
    if rollout.placement != "local" or gpu.is_usable():
        return
    if not any(name in ARCHITECTURES for name in hf_config.get("architectures") or []):
        return
    hf_config = resolve_aliases(hf_config)
    family = model_family(hf_config)
    hidden = hf_config.get("hidden_size")
    heads = hf_config.get("num_attention_heads")
    if not (hidden and heads and hf_config.get("num_hidden_layers")):
        return  # the engine's own error is more precise
    if family.latent_attention:
        # vLLM's own variable, which its engines inherit: with it they compute keys and values.
        is_disabled = os.environ.get("VLLM_MLA_DISABLE", "0") != "0"
        for key, size in LATENT_SIZES.items():
            if hf_config.get(key, size) != size and not is_disabled:
                raise UserError(
                    f"config.json: {key}={hf_config[key]}: {_cpu_sizes_remedy(str(size))}",
                    key=key,
                    cause=Cause.UNSUPPORTED,
                )
    elif (size := hf_config.get("head_dim") or hidden // heads) not in HEAD_SIZES:
        name = "head_dim" if hf_config.get("head_dim") else "hidden_size / num_attention_heads"
        raise UserError(
            f"config.json: {name}={size}: {_cpu_sizes_remedy(', '.join(map(str, HEAD_SIZES)))}",
            key=name,
            cause=Cause.UNSUPPORTED,
        )
    if any(sparse_layers(hf_config)):
        _check_experts(rollout, hf_config)


def _check_experts(rollout: RolloutConfig, hf_config: HFConfig) -> None:
    family = model_family(hf_config)
    multiples = _cpu_sizes_remedy(f"multiples of {CPU_EXPERT_ALIGNMENT} in a model with experts")
    if hf_config["hidden_size"] % CPU_EXPERT_ALIGNMENT:
        raise UserError(
            f"config.json: hidden_size={hf_config['hidden_size']}: {multiples}",
            key="hidden_size",
            cause=Cause.INDIVISIBLE,
        )
    if "n_shared_experts" in family.required_keys and hf_config.get("n_shared_experts") == 0:
        raise UserError(
            "config.json: n_shared_experts=0: on a CPU, vLLM's engine ends without a message at "
            f"matrices of no width; {SIZE_REMEDY}",
            key="n_shared_experts",
            cause=Cause.UNSUPPORTED,
        )
    ranks = 1 if rollout.expert_parallel else rollout.tensor_parallel * rollout.data_parallel
    if family.clamped_swiglu and (size := hf_config["intermediate_size"]) % (
        CPU_EXPERT_ALIGNMENT * ranks
    ):
        sharing_note = f" shared by {ranks} ranks" if ranks > 1 else ""
        raise UserError(
            f"config.json: intermediate_size={size}{sharing_note}: {multiples}",
            key="intermediate_size",
            cause=Cause.INDIVISIBLE,
        )


def _cpu_sizes_remedy(sizes: str) -> str:
    return f"on a CPU, vLLM computes only {sizes}; {SIZE_REMEDY}"
