"""Weights quantized to FP8 during a push, from sharded trainers to sliced engines.

Oracle: DeepSeek's published formula in numpy, rounding by a table of all 256 codes.
"""

import numpy as np
import pytest
import torch
from push_world import World, draw, table_of
from refusals import raised, refused
from torch.distributed import TCPStore
from waiting import PATIENT

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.formats.published_layout import is_quantized, scale_name
from megatron_r1.push import parameter_regions
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.matching.recipe_plan import check_blocks, check_pushes
from megatron_r1.push.matching.regions import Region, scale_region
from megatron_r1.push.matching.tensors import pushed_tensors
from megatron_r1.push.protocol import ReceiverInfo
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.sender import WeightSender
from megatron_r1.push.slots import SlotTable, dtype_of, slot_view
from megatron_r1.push.transports import gloo
from tools.bench.push.small_model import rank_tensors

DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 192,  # blocks are cut off by the tensors' edges
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 100,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "vocab_size": 130,
    "num_nextn_predict_layers": 0,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 130,
    "tie_word_embeddings": True,
}
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
FINITE = np.flatnonzero(~np.isnan(CODES[:127]))  # 0 and the positive ones, ascending


def rounded(x):
    """Codes of the e4m3 numbers nearest to x, the even code of two equally near."""
    magnitude = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(CODES[FINITE], magnitude), 0, len(FINITE) - 1)
    below = np.maximum(above - 1, 0)
    up, down = CODES[FINITE][above] - magnitude, magnitude - CODES[FINITE][below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (FINITE[nearest] + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def published(weight, scale_fmt=None):
    """(codes, scales) of a matrix: scale = amax / 448, code = e4m3(x / scale), in fp32; "ue8m0": in
    fp64, the scale rounded up to a power of two."""
    w = weight.float().numpy()
    codes = np.empty(w.shape, np.uint8)
    scales = np.empty([-(-size // 128) for size in w.shape], np.float32)
    for i, j in np.ndindex(*scales.shape):
        at = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        scales[i, j] = np.maximum(np.abs(w[at]).max(), np.float32(1e-4)) / np.float32(448)
        if scale_fmt == "ue8m0":
            amax = max(np.abs(w[at].astype(np.float64)).max(), np.float64(np.float32(1e-4)))
            scales[i, j] = 2.0 ** np.ceil(np.log2(amax / 448))
            codes[at] = rounded(w[at].astype(np.float64) / scales[i, j])
            continue
        codes[at] = rounded(w[at] * (np.float32(1) / scales[i, j]))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)


def checkpoint(tensors, scale_fmt=None):
    """The FP8 checkpoint of the same weights."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if is_quantized(name):
            found[name], found[scale_name(name)] = published(tensor, scale_fmt)
    return found


def assert_received(world, expected):
    for rank, receiver in world.receivers.items():
        for slot in receiver.table.slots:
            received = slot_view(receiver.memory, slot).contiguous().view(torch.uint8)
            whole = expected[slot.name].to(dtype_of(slot))
            whole = whole if whole.dim() > 1 else whole[:, None]
            part = whole[slot.top : slot.bottom, slot.left : slot.right].contiguous()
            assert torch.equal(received, part.view(torch.uint8)), (rank, slot.name)


@pytest.mark.more
@pytest.mark.parametrize(
    ("hf_config", "grid", "engine", "transport"),
    [
        (DEEPSEEK, TrainerGrid(1), EngineLayout(), "shm"),
        (
            DEEPSEEK,
            TrainerGrid(2, tensor=2, expert_tensor=2),
            EngineLayout(tensor_parallel=2),
            "gloo",
        ),
        (
            DEEPSEEK,
            TrainerGrid(4, tensor=2, expert=2),
            EngineLayout(tensor_parallel=2, expert_parallel=True),
            "shm",
        ),
        (DEEPSEEK, TrainerGrid(2, pipeline=2), EngineLayout(data_parallel=2), "gloo"),
        (QWEN, TrainerGrid(2, tensor=2), EngineLayout(tensor_parallel=2), "gloo"),
    ],
    ids=["one", "tensor", "experts", "stages", "qwen"],
)
def test_an_engine_receives_the_fp8_checkpoint_of_the_same_weights(
    hf_config, grid, engine, transport, monkeypatch
):
    monkeypatch.setattr(gloo, "BUCKET_BYTES", 10_000)  # chunks are cut
    check_blocks(hf_config, engine, tensor=grid.tensor, expert_tensor=grid.expert_tensor)
    first, second = draw(hf_config, 1), draw(hf_config, 2)
    world = World(hf_config, grid, engine, first, transport=transport)
    try:
        world.push(1)
        assert_received(world, checkpoint(first))
        for rank, held in enumerate(world.held):
            for name, now in rank_tensors(hf_config, grid, rank, second).items():
                for (parameter, _), (values, _) in zip(held[name], now, strict=True):
                    parameter.copy_(values)
        world.push(2)
        assert_received(world, checkpoint(second))
    finally:
        world.close()
    sent = sum(sum(answer.num_bytes.values()) for answer in world.answers)
    slots = [slot for receiver in world.receivers.values() for slot in receiver.table.slots]
    assert sent == sum(s.height * s.width * dtype_of(s).itemsize for s in slots)


def test_a_model_whose_scales_are_powers_of_two_is_pushed_with_such():
    hf_config = {**DEEPSEEK, "quantization_config": {"scale_fmt": "ue8m0"}}
    tensors = draw(DEEPSEEK, 1)
    for name, tensor in tensors.items():  # where rounding decides: amax is 448 x 2^k, or next to it
        if is_quantized(name):
            tensor[0, :3] = torch.tensor([448.0, 450.0, 446.0]) * 2.0**8
            tensor[-1, :1] = 450.0 * 2.0**8
    world = World(
        hf_config,
        TrainerGrid(2, tensor=2, expert_tensor=2),
        EngineLayout(tensor_parallel=2),
        tensors,
    )
    try:
        world.push(1)
        assert_received(world, checkpoint(tensors, "ue8m0"))
    finally:
        world.close()
    scales = [s for name, s in checkpoint(tensors, "ue8m0").items() if "scale_inv" in name]
    assert all((torch.frexp(each).mantissa == 0.5).all() for each in scales)


def test_each_block_is_quantized_once_a_push(monkeypatch):
    monkeypatch.setattr(gloo, "BUCKET_BYTES", 10_000)
    sizes, quantize = [], parameter_regions.quantize_fp8
    monkeypatch.setattr(
        parameter_regions,
        "quantize_fp8",
        lambda x, **kind: sizes.append(x.numel()) or quantize(x, **kind),
    )
    tensors = draw(DEEPSEEK, 1)
    world = World(DEEPSEEK, TrainerGrid(2, tensor=2), EngineLayout(), tensors)
    try:
        for number in (1, 2, 3):
            world.push(number)
    finally:
        world.close()
    once = sum(tensor.numel() for name, tensor in tensors.items() if is_quantized(name))
    assert sum(sizes) == 3 * once


def test_the_tensors_of_an_fp8_engine_are_those_deepseek_publishes():
    found = dict(pushed_tensors(read_hf_config("examples/deepseek_r1/model"), fp8=True))
    layer = "model.layers.3."
    for name, shape in {
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": (5, 56),
        "self_attn.kv_b_proj.weight_scale_inv": (256, 4),
        "self_attn.q_b_proj.weight_scale_inv": (192, 12),
        "mlp.experts.255.gate_proj.weight_scale_inv": (16, 56),
        "mlp.experts.255.down_proj.weight": (7168, 2048),
    }.items():
        assert found[layer + name] == shape
    assert layer + "mlp.gate.weight_scale_inv" not in found
    assert "lm_head.weight_scale_inv" not in found
    assert not any("scale" in name for name, _ in pushed_tensors(DEEPSEEK, fp8=False))


def test_scales_of_a_region_of_blocks():
    assert scale_region(Region(128, 320, 0, 256)) == Region(1, 3, 0, 2)


@pytest.mark.parametrize(
    ("hf_config", "engine", "trainer", "shows"),
    [
        (DEEPSEEK, EngineLayout(), (4, 1), ["parallel.tensor=4", "o_proj", 64]),
        (DEEPSEEK, EngineLayout(), (1, 4), ["parallel.expert_tensor=4", "experts.0.gate"]),
        (
            DEEPSEEK,
            EngineLayout(tensor_parallel=4),
            (1, 1),
            ["rollout.tensor_parallel=4", "o_proj", 64],
        ),
        (
            DEEPSEEK,
            EngineLayout(tensor_parallel=2, data_parallel=2),
            (1, 1),
            [
                "rollout.tensor_parallel=2",
                "rollout.data_parallel=2",
                "expert_parallel",
                "experts.0",
            ],
        ),
        (DEEPSEEK | {"q_lora_rank": 96}, EngineLayout(), (1, 1), ["q_a_proj"]),
        (QWEN | {"num_attention_heads": 8}, EngineLayout(), (1, 1), ["heads of 64"]),
    ],
)
def test_a_layout_that_cuts_blocks_is_refused(hf_config, engine, trainer, shows):
    with refused("push.fp8", Cause.INDIVISIBLE, *shows):
        check_blocks(hf_config, engine, tensor=trainer[0], expert_tensor=trainer[1])


def test_deepseek_v3_can_be_pushed_in_fp8_as_it_is_laid_out_in_the_example():
    hf_config = read_hf_config("examples/deepseek_r1/model")
    engine = EngineLayout(64, tensor_parallel=8, data_parallel=2, expert_parallel=True)
    check_blocks(hf_config, engine, tensor=8, expert_tensor=1)


def test_a_recipe_is_refused_before_anything_starts():
    config = {"push": {"fp8": True}, "rollout": {"tensor_parallel": 4, "dtype": "bfloat16"}}
    with refused("push.fp8", Cause.INDIVISIBLE, "rollout.tensor_parallel=4"):
        check_pushes(Config.model_validate(config), DEEPSEEK, world_size=8)
    config["rollout"] = {"dtype": "float32"}
    with raised(ValueError, "push.fp8", "rollout.dtype: bfloat16"):
        Config.model_validate(config)


def test_an_engine_with_fp8_of_another_kind_is_refused():
    def without_scales(hf_config, engine, rank):
        table = table_of(hf_config, engine, rank)
        return SlotTable(table.num_bytes, [s for s in table.slots if "scale" not in s.name])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = EngineRendezvous(store, "other", PATIENT)
    rendezvous.publish_receiver(0, ReceiverInfo(without_scales(DEEPSEEK, EngineLayout(), 0)))
    held = rank_tensors(DEEPSEEK, TrainerGrid(1), 0, draw(DEEPSEEK, 1))
    sender = WeightSender(DEEPSEEK, TrainerGrid(1), held, store)
    answer = sender.connect([("other", 1)], EngineLayout(), "gloo", 5)
    assert "float8_e4m3fn without model.layers.0" in answer.problems["other"]
