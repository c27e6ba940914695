"""Checkpoints of the trainer with Transformer Engine's layers, on the null GPU."""

import pytest
from nullgpu.conftest import TORCHRUN
from nullgpu.random_weights import write_random
from small_models import DEEPSEEK, QWEN

from megatron_r1.models.weights import hf_tensors

# Multiples of 128, FP8's blocks.
WIDE = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
LATENT = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
MODELS = {
    "deepseek": {
        **DEEPSEEK,
        **WIDE,
        **LATENT,
        "qk_rope_head_dim": 64,
        "moe_intermediate_size": 128,
    },
    "qwen": {**QWEN, **WIDE, "num_attention_heads": 4},
}
BF16 = ("bfloat16", "none", "float32")
BLOCKWISE = ("bfloat16", "blockwise", "float32")
BF16_MOMENTS = ("bfloat16", "none", "bfloat16")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, hf_config in MODELS.items():
        write_random(folder / name, hf_config)
    return folder


def round_trip(on_null_gpu, models, model, settings, *defect: str) -> str:
    return on_null_gpu("checkpoint_round_trip.py", str(models / model), *settings, *defect)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("deepseek", BF16),
        ("deepseek", BLOCKWISE),
        ("deepseek", BF16_MOMENTS),
        ("qwen", ("float32", "none", "float32")),
    ],
    ids=["bf16", "fp8 with experts", "bf16 moments", "fp32 dense"],
)
def test_what_is_saved_is_loaded_bit_by_bit(on_null_gpu, models, model, settings):
    printed = round_trip(on_null_gpu, models, model, settings)
    assert "equal: " in printed.splitlines()[-1]


def test_a_save_needs_no_room_for_the_reference_beside_an_engine(on_null_gpu, models):
    """Where it is brought to the GPU, as it once was, the error says that memory is short."""
    beside = {
        "NULL_GPU_BYTES": str(2 * 2**30),
        "NULL_GPU_NCCL_BYTES": str(2**20),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = ["checkpoint_round_trip.py", str(models / "deepseek"), *BF16, "engine"]
    assert "equal: " in on_null_gpu(*command, **beside)
    with pytest.raises(pytest.fail.Exception) as failed:
        on_null_gpu(*command, "save_the_reference_from_the_gpu", **beside)
    assert "out of memory" in str(failed.value)


@pytest.mark.parametrize(("model", "settings"), [("deepseek", BLOCKWISE), ("qwen", BF16)])
def test_so_are_adapters_of_transformer_engine_s_layers(on_null_gpu, models, model, settings):
    printed = round_trip(on_null_gpu, models, model, settings, "lora")
    names = hf_tensors(MODELS[model])
    linear = sum(name.endswith(("_proj.weight", "_mqa.weight")) for name in names)
    # Factors, which fused layers stack, with master weights and two moments each.
    assert 4 * linear <= int(printed.split("equal: ")[1].split()[0]) <= 8 * linear, printed[-500:]


@pytest.mark.parametrize(
    ("settings", "defect", "message"),
    [
        (BF16, "load_strictly", "Missing key(s) in state_dict"),
        (BF16_MOMENTS, "store_remainders", "AssertionError"),
    ],
    ids=["strict load", "remainders"],
)
def test_a_defect_of_the_past_is_found_when_it_is_planted_again(
    on_null_gpu, models, settings, defect, message
):
    with pytest.raises(pytest.fail.Exception) as failed:
        round_trip(on_null_gpu, models, "deepseek", settings, defect)
    assert message in str(failed.value)


def test_an_offloaded_optimizer_is_on_the_host_and_updates_and_resumes_as_any(
    on_null_gpu, models, tmp_path
):
    script = ["optimizer_offload_on_null_gpu.py", str(models / "qwen"), str(tmp_path), "one"]
    assert "one holds" in on_null_gpu(*TORCHRUN, *script)
