"""Pushes of adapters alone: every factor arrives whole from any trainer grid, and what vLLM cannot
serve is refused before anything starts."""

from typing import get_args

import pytest
import torch
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.weights.adapter_table import adapter_shapes, adapter_table
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.matching.adapter_push import (
    MAX_RANKS,
    PredictedAdapterSharding,
    check_adapter_push,
    max_lora_rank,
)
from megatron_r1.push.matching.recipe_plan import check_pushes, engine_rank_bytes, planned_push
from tests.unit.push.push_models import DEEPSEEK, QWEN
from tests.unit.push.push_world import World, wrong_slots
from tools.bench.push.small_model import slot_table

SOME = ["q_proj", "v_proj", "down_proj"]
SERVED = ["q_b_proj", "o_proj", "mlp.down_proj", "shared_experts.up_proj"]


@pytest.mark.parametrize(
    ("hf_config", "targets", "grid", "layout"),
    [
        (QWEN, None, TrainerGrid(2, tensor=2), EngineLayout(tensor_parallel=2)),
        # Fewer key and value heads than ranks: their rows are on some of them only.
        (QWEN, None, TrainerGrid(4, tensor=4), EngineLayout()),
        (QWEN, SOME, TrainerGrid(4, tensor=2, pipeline=2), EngineLayout(pipeline_parallel=2)),
        (DEEPSEEK, SERVED, TrainerGrid(4, tensor=2, expert=2), EngineLayout(data_parallel=2)),
    ],
)
def test_every_engine_rank_has_all_factors_of_its_layers(hf_config, targets, grid, layout):
    weights = adapter_table(hf_config, LoraConfig(rank=3, targets=targets))
    shapes = adapter_shapes(weights)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    sharding = PredictedAdapterSharding(hf_config, layout, weights)

    def table(hf_config, engine, rank):
        return slot_table(sharding, engine.coordinate(rank))

    world = World(hf_config, grid, layout, tensors, engines=2, table=table, adapters=weights)
    try:
        assert all(answer.problems == {} for answer in world.answers), world.answers
        # Each byte enters the set once, whichever of its replicas sends it.
        sent = sum(answer.num_bytes[world.name] for answer in world.answers)
        once = 2 * sum(tensor.numel() for tensor in tensors.values())
        assert sent == once * layout.tensor_parallel * layout.data_parallel
        world.push(1)
        assert wrong_slots(world, tensors, 1) == []
        for rank in range(layout.ranks_per_engine):
            stage = layout.coordinate(rank).pipeline
            half = hf_config["num_hidden_layers"] // layout.pipeline_parallel
            held = {int(slot.name.split(".")[2]) for slot in world.receivers[0, rank].table.slots}
            assert held == set(range(stage * half, (stage + 1) * half))
    finally:
        world.close()


def recipe(**sections) -> Config:
    settings = {"model": {"lora": {"rank": 3}}, "push": {"adapter_only": True}}
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    return Config.model_validate(settings)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_push_is_planned_with_the_adapters_bytes(tensor):
    # Two tensor ranks both hold the factor that neither splits; one sends it.
    parallel = {"processes": tensor, "tensor": tensor}
    config = recipe(rollout={"dtype": "bfloat16"}, parallel=parallel)
    check_pushes(config, QWEN, tensor)
    hidden, inner, kv, rank, layers = 32, 64, 16, 3, 4
    widths = [2 * (hidden + hidden), 2 * (hidden + kv), 3 * (hidden + inner)]  # q o, k v, mlp
    expected = 2 * rank * layers * sum(widths)
    assert engine_rank_bytes(config, QWEN) == expected
    (plan,) = planned_push(config, QWEN)
    assert sum(entry.num_bytes for engine_rank in plan for entry in engine_rank) == expected


@pytest.mark.parametrize(
    ("sections", "hf_config", "key", "cause", "shown"),
    [
        ({"model": {"lora": None}}, QWEN, "push.adapter_only", Cause.MISSING, "model.lora.rank"),
        ({"push": {"fp8": True}}, QWEN, "push.adapter_only", Cause.CONFLICT, "push.fp8: true"),
        (
            {"rollout": {"colocated": True}},
            QWEN,
            "push.adapter_only",
            Cause.CONFLICT,
            "rollout.colocated: true",
        ),
        (
            {"rollout": {"speculative": {"method": "mtp"}}},
            QWEN,
            "push.adapter_only",
            Cause.CONFLICT,
            "rollout.speculative.method: mtp",
        ),
        (
            {"rollout": {"redundant_experts": 4}},
            DEEPSEEK,
            "push.adapter_only",
            Cause.CONFLICT,
            "rollout.redundant_experts: 4",
        ),
        (
            {"model": {"checkpoint": "a/b"}},
            QWEN,
            "push.adapter_only",
            Cause.CONFLICT,
            "model.checkpoint: a/b",
        ),
        (
            {},
            QWEN | {"quantization_config": {"quant_method": "fp8"}},
            "push.adapter_only",
            Cause.CONFLICT,
            "model.path",
        ),
        ({"model": {"lora": {"rank": 513}}}, QWEN, "model.lora.rank", Cause.TOO_LARGE, "513"),
        ({}, DEEPSEEK, "model.lora.targets", Cause.UNSUPPORTED, "mlp.experts.down_proj"),
        (
            {"model": {"lora": {"targets": ["o_proj", "kv_b_proj"]}}},
            DEEPSEEK,
            "model.lora.targets",
            Cause.UNSUPPORTED,
            "self_attn.kv_b_proj",
        ),
    ],
)
def test_what_vllm_cannot_serve_is_refused(sections, hf_config, key, cause, shown):
    with refused(key, cause, shown):
        check_adapter_push(recipe(**sections), hf_config)


def test_targets_that_vllm_serves_are_not_refused():
    check_adapter_push(recipe(model={"lora": {"targets": SERVED}}), DEEPSEEK)
    check_adapter_push(recipe(model={"lora": {"rank": 512}}), QWEN)
    check_adapter_push(recipe(push={"adapter_only": False}, model={"lora": None}), QWEN)


def test_ranks_are_those_of_vllm():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == MAX_RANKS
    assert [max_lora_rank(rank) for rank in (1, 3, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
