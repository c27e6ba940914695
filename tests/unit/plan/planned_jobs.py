"""Jobs of the 671B recipe on 2,048 GPUs, and models of published sizes."""

from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples/deepseek_r1/r1_zero.yaml"
LAPTOP = [str(ROOT / "examples/laptop/r1_zero.yaml")]
LAPTOP += ["--model.path", str(ROOT / "examples/laptop/model")]
V3 = read_hf_config(ROOT / "examples/deepseek_r1/model")
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}
QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


BY_HAND = {"parallel.tokens_per_microbatch": 18_432, "rollout.redundant_experts": 0}
"""What tests count with by hand, whatever the recipe has: 16 micro-batches of a replica, one round
of virtual stages, and each expert once in an engine."""


def real_job(**parallel) -> PlannedJob:
    changed = {f"parallel.{key}": value for key, value in parallel.items()}
    config = configuration.load_recipe(RECIPE, BY_HAND | changed)
    return PlannedJob(V3, config, 2048, HARDWARE["H800"])


def planned(**overrides) -> PlannedJob:
    """The real job with settings of the recipe such as push__fp8; rollout_gpus: the engines'."""
    gpus = overrides.pop("rollout_gpus", 0)
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return PlannedJob(
        V3,
        configuration.load_recipe(RECIPE, BY_HAND | changed),
        2048,
        HARDWARE["H800"],
        rollout_gpus=gpus,
    )
