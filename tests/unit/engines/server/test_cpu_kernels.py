"""Sizes that vLLM's kernels for CPUs lack are named by their keys before an engine starts."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.server import cpu_kernel_checks, gpu
from megatron_r1.engines.server.recipe_checks import check_ranks

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    **{"num_hidden_layers": 2, "hidden_size": 72, "num_attention_heads": 6, "head_dim": 64},
}
MOE = {
    **QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    **{"hidden_size": 96, "num_experts": 4, "decoder_sparse_step": 1},
}
LATENT = {
    **{key: size for key, size in MOE.items() if key not in ("num_experts", "head_dim")},
    "architectures": ["DeepseekV3ForCausalLM"],
    **{"n_routed_experts": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_shared_experts": 1},
}
OSS = {
    **{key: size for key, size in MOE.items() if key != "num_experts"},
    "architectures": ["GptOssForCausalLM"],
    **{"num_local_experts": 4, "intermediate_size": 64},
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "is_usable", lambda: False)


@pytest.mark.parametrize(
    ("hf_config", "key", "size", "cause"),
    [
        (QWEN, "head_dim", 40, Cause.UNSUPPORTED),
        (MOE, "hidden_size", 112, Cause.INDIVISIBLE),
        (LATENT, "kv_lora_rank", 256, Cause.UNSUPPORTED),
        (LATENT, "qk_rope_head_dim", 32, Cause.UNSUPPORTED),
        (LATENT, "hidden_size", 80, Cause.INDIVISIBLE),
        (LATENT, "n_shared_experts", 0, Cause.UNSUPPORTED),
        (OSS, "intermediate_size", 48, Cause.INDIVISIBLE),
    ],
)
def test_a_size_that_vllm_lacks_on_a_cpu_is_named(hf_config, key, size, cause, monkeypatch):
    hf_config = hf_config | {key: size}
    with refused(key, cause, f"{key}={size}"):
        cpu_kernel_checks.check_cpu_kernels(RolloutConfig(), hf_config)
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(placement="hosts"), hf_config)
    monkeypatch.setattr(gpu, "is_usable", lambda: True)
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(), hf_config)


def test_a_head_without_a_size_of_its_own_is_computed():
    with refused("hidden_size / num_attention_heads", Cause.UNSUPPORTED, 12):
        cpu_kernel_checks.check_cpu_kernels(RolloutConfig(), QWEN | {"head_dim": None})


def test_ranks_share_the_width_of_an_expert():
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(tensor_parallel=2), OSS)
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(tensor_parallel=4, expert_parallel=True), OSS)
    with refused("intermediate_size", Cause.INDIVISIBLE, 64, "4 ranks"):
        cpu_kernel_checks.check_cpu_kernels(RolloutConfig(tensor_parallel=4), OSS)


@pytest.mark.parametrize(
    "hf_config",
    [
        QWEN,
        MOE,
        LATENT,
        LATENT | {"hidden_size": 80, "first_k_dense_replace": 2},
        {**QWEN, "architectures": ["Gemma3ForCausalLM"], "head_dim": 40},
        {"architectures": ["Qwen3ForCausalLM"]},
    ],
)
def test_other_sizes_and_unknown_or_incomplete_configurations_pass(hf_config):
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(), hf_config)


def test_the_sizes_are_those_of_the_installed_vllm():
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM: make setup")
    package = Path(spec.origin).parent
    attention = (package / "v1/attention/backends/cpu_attn.py").read_text()
    listed = [size for size in cpu_kernel_checks.HEAD_SIZES if size != 48]
    assert f"return {listed}" in attention
    experts = (package / "model_executor/layers/fused_moe/experts/cpu_moe.py").read_text()
    assert f"output_alignment = {cpu_kernel_checks.CPU_EXPERT_ALIGNMENT}" in experts


@pytest.mark.parametrize(
    "changes", [{"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 3}, {"num_experts": 0}]
)
def test_experts_in_no_layer_are_refused_where_vllm_needs_one(changes):
    check_ranks(RolloutConfig(), MOE, "rollout")
    with refused("config.json", Cause.UNSUPPORTED, "Qwen3MoeForCausalLM"):
        check_ranks(RolloutConfig(), MOE | changes, "rollout")


def test_latents_of_any_size_are_computed_as_keys_and_values(monkeypatch):
    monkeypatch.setattr(cpu_kernel_checks.gpu, "is_usable", lambda: False)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    cpu_kernel_checks.check_cpu_kernels(RolloutConfig(), LATENT | {"kv_lora_rank": 256})
