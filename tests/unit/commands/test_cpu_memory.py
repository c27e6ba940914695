"""What a run takes on a CPU: the planner's arithmetic, itself tested against real ranks, agrees."""

import json

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.parts import cpu_memory as memory
from megatron_r1.commands.parts.cpu_memory import CPUMemory, cpu_memory
from megatron_r1.config import Config
from megatron_r1.models.memory import layer_activations
from megatron_r1.models.weights import num_parameters
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import rank_memory

# SmolLM2-135M's and a mixture of experts with latent attention.
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
}
GIB = 1 << 30


def recipe(tmp_path, ranks: int = 1, **changed) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    model = {"path": str(tmp_path), "dtype": "float32", **changed.pop("model", {})}
    rollout = {"dtype": "float32", **changed.pop("rollout", {})}
    parallel = {"processes": ranks, **changed.pop("parallel", {})}
    return Config.model_validate(
        {"model": model, "rollout": rollout, "parallel": parallel, **changed}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "ranks, tensor, kl_beta, lora",
    [(1, 1, 0.001, None), (3, 3, 0.0, None), (2, 1, 0.001, None), (2, 1, 0.001, {"rank": 64})],
)
def test_weights_are_those_of_the_plan(tmp_path, dtype, ranks, tensor, kl_beta, lora):
    settings = {"model": {"dtype": dtype, "lora": lora}, "parallel": {"tensor": tensor}}
    config = recipe(tmp_path, ranks, **settings, rl={"kl_beta": kl_beta})
    job = PlannedJob(memory.read_hf_config(str(tmp_path)), config, ranks, HARDWARE["H800"])
    (of_rank,) = rank_memory(job)  # ranks of one pipeline stage are equal
    planned = of_rank.resident_bytes + of_rank.host["reference"]
    copies = of_rank.host["checkpoint being written"]
    found = cpu_memory(config, ranks, has_engines=True)
    assert found.weight_bytes == pytest.approx(ranks * (planned + copies), rel=0.01)


def test_activations_are_the_plan_s_and_what_local_layers_keep_beside_them(tmp_path):
    config = recipe(tmp_path)
    fused, local = (layer_activations(DENSE, config, 1, sparse=False, local=x) for x in (0, 1))
    # 9 heads and 3 groups of 64 thrice more, and the MLP's output of 1,536 before its product.
    assert local.total - fused.total == (3 * 12 * 64 + 1536) * 4
    plain, again = (
        cpu_memory(recipe(tmp_path, parallel={"recompute": x}), 1, has_engines=False)
        for x in ("none", "full")
    )
    states = 2 * 576 * 4
    assert plain.bytes_per_token == 30 * local.total + states
    assert again.bytes_per_token == 29 * local.input + local.total + states
    # Measured: 15.4 GB in all with one micro-batch of 8,064 tokens, where the kernel ended it.
    assert plain.weight_bytes + 8064 * plain.bytes_per_token == pytest.approx(15.4e9, rel=0.1)


def test_a_micro_batch_is_what_the_free_memory_has_room_for():
    def tokens(free: float, wanted: int | None = None) -> int:
        return CPUMemory(3 * GIB, 2 * GIB, GIB, 1 << 20, int(free * GIB)).microbatch_tokens(wanted)

    assert tokens(64) == 3 * 512  # 1.5 GiB of activations
    assert CPUMemory(GIB, GIB, GIB, 1 << 10, 64 * GIB).microbatch_tokens(None) == 16_384
    assert tokens(8) == int((0.9 * 8 - 6) * 1024)
    assert tokens(64, 20_000) == 20_000
    assert tokens(6.4) == tokens(5.5) == memory.MIN_TOKENS  # where the rest may be shared pages
    with refused("parallel.processes", Cause.TOO_LARGE, "6.5 GiB", 5.4):
        tokens(5.4)
    with refused("parallel.tokens_per_microbatch", Cause.TOO_LARGE, "16,384", 16.0, "1,228"):
        tokens(8, 16_384)


def test_engines_elsewhere_take_nothing_here_and_a_score_head_no_logits(tmp_path):
    here = cpu_memory(recipe(tmp_path), 1, has_engines=True)
    hosts = cpu_memory(recipe(tmp_path, rollout={"placement": "hosts"}), 1, has_engines=True)
    assert here.engine_weight_bytes == 2 * 134_515_008 * 4 and hosts.engine_weight_bytes == 0
    assert here.other_bytes > hosts.other_bytes + GIB
    score = cpu_memory(recipe(tmp_path, model={"head": "score"}), 1, has_engines=False)
    assert score.other_bytes < hosts.other_bytes and score.engine_weight_bytes == 0


def test_a_critic_and_a_teacher_take_memory_too(tmp_path):
    grpo = cpu_memory(recipe(tmp_path), 1, has_engines=True)
    ppo = cpu_memory(
        recipe(tmp_path, rl={"algorithm": "ppo", "kl_beta": 0.001}), 1, has_engines=True
    )
    # The reference has no critic; weights, gradients, moments and a checkpoint's buffers of both.
    score = num_parameters(memory.read_hf_config(str(tmp_path), "score"))
    critic_bytes = score * (4 + 4 + 8 + 12 + 4)
    assert ppo.weight_bytes - grpo.weight_bytes == pytest.approx(critic_bytes, rel=1e-4)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(DENSE | {"dtype": "bfloat16"}))
    (teacher / "model.safetensors").write_bytes(bytes(2 * 5000))
    settings = {"path": str(teacher), "engines": 3, "dtype": "float32"}
    taught = cpu_memory(recipe(tmp_path, teacher=settings), 1, has_engines=True)
    assert taught.engine_weight_bytes == grpo.engine_weight_bytes + 3 * 4 * 5000
    assert taught.other_bytes > grpo.other_bytes + 3 * GIB
    settings["by_source"] = {"math": {"path": str(teacher), "dtype": "bfloat16"}}
    by_two = cpu_memory(recipe(tmp_path, teacher=settings), 1, has_engines=True)
    assert by_two.engine_weight_bytes == taught.engine_weight_bytes + 2 * 5000


def test_moments_in_bfloat16_save_nothing_on_a_cpu(tmp_path):
    rounded = cpu_memory(recipe(tmp_path, optimizer={"moments": "bfloat16"}), 1, has_engines=True)
    assert rounded.weight_bytes == cpu_memory(recipe(tmp_path), 1, has_engines=True).weight_bytes
