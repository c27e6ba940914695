"""Pushes that enter one engine of a set each and are relayed, against plain slicing."""

from functools import partial

import pytest
import torch
from refusals import raised
from waiting import PATIENT

from megatron_r1.models.weights.formats.quantized_blocks import quantize_fp8
from megatron_r1.push.control_messages import SentWeights
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.rendezvous import EngineSetFailedError
from megatron_r1.push.slots import slot_view
from megatron_r1.push.transports.payloads import BufferPayload
from tests.unit.push.push_models import DEEPSEEK, DEEPSEEK_MTP, QWEN
from tests.unit.push.push_world import World, draw, plain_table, wrong_slots

SPREAD = EngineLayout(tensor_parallel=2, data_parallel=2, expert_parallel=True)


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize(
    ("hf_config", "grid", "layout"),
    [
        (
            DEEPSEEK,
            TrainerGrid(8, tensor=2, pipeline=2, expert=2),
            EngineLayout(tensor_parallel=2, data_parallel=2, expert_parallel=True),
        ),
        (DEEPSEEK, TrainerGrid(4, expert=4), EngineLayout(tensor_parallel=2)),
        (
            QWEN,
            TrainerGrid(4, tensor=2, pipeline=2),
            EngineLayout(tensor_parallel=2, pipeline_parallel=2),
        ),
        (QWEN, TrainerGrid(1), EngineLayout()),
    ],
)
def test_every_engine_has_every_slice_after_each_push(hf_config, grid, layout, engines):
    tensors = draw(hf_config, 1)
    world = World(hf_config, grid, layout, tensors, engines=engines, table=plain_table)
    try:
        assert all(answer.problems == {} for answer in world.answers), world.answers
        for number in (1, 2):
            assert all(answer == SentWeights({}) for answer in world.send(number))
            for receiver in world.receivers.values():
                receiver.received_chunks.wait(number, PATIENT)
            assert wrong_slots(world, tensors, number) == []
            for held in world.held:
                for parameter in {id(p): p for pieces in held.values() for p, _ in pieces}.values():
                    parameter.mul_(-2)
            tensors = {name: tensor * -2 for name, tensor in tensors.items()}
    finally:
        world.close()


@pytest.mark.parametrize("layout", [SPREAD, EngineLayout(tensor_parallel=2)])
def test_drafters_have_every_slice_of_mtp_layers_too(make_world, layout):
    tensors = draw(DEEPSEEK_MTP, 1, with_mtp=True)
    grid, table = TrainerGrid(4, tensor=2, pipeline=2), partial(plain_table, drafts=True)
    world = make_world(DEEPSEEK_MTP, grid, layout, tensors, engines=2, table=table, drafts=True)
    world.push(1)
    assert wrong_slots(world, tensors, 1) == []
    names = {slot.name for at in world.receivers.values() for slot in at.table.slots}
    layers = {"eh_proj", "enorm", "shared_head.norm", "mlp.experts.7.up_proj"}
    assert {f"model.layers.4.{name}.weight" for name in layers} <= names


def test_an_engine_whose_drafter_takes_no_pushes_is_refused(make_world):
    tensors = draw(DEEPSEEK_MTP, 1, with_mtp=True)
    with raised(EngineSetFailedError, "model.layers.4.enorm.weight"):
        make_world(DEEPSEEK_MTP, GRID, SPREAD, tensors, engines=2, table=plain_table, drafts=True)


@pytest.fixture
def make_world():
    worlds = []

    def make(*args, **named):
        worlds.append(World(*args, **named))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


GRID = TrainerGrid(4, pipeline=2, expert=2)


def test_an_fp8_push_gives_all_engines_the_same_codes_and_scales(make_world):
    hf_config = DEEPSEEK | {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
    }
    hf_config |= {"q_lora_rank": 128, "kv_lora_rank": 192, "qk_nope_head_dim": 64, "v_head_dim": 64}
    hf_config |= {"qk_rope_head_dim": 64}
    tensors = draw(hf_config, 1)
    world = make_world(hf_config, TrainerGrid(2, expert=2), EngineLayout(), tensors, engines=2)
    assert world.send(1) == [SentWeights({})] * 2
    first, second = world.receivers.values()
    for receiver in (first, second):
        receiver.received_chunks.wait(1, PATIENT)
    for slot in first.table.slots:  # between them nothing is written
        assert torch.equal(*(slot_view(r.memory, slot).float() for r in (first, second))), slot.name
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    codes, scales = quantize_fp8(tensors[name])
    found = {slot.name: slot_view(first.memory, slot) for slot in first.table.slots}
    assert torch.equal(found[name].float(), codes.float())
    assert torch.equal(found[name + "_scale_inv"], scales)


def test_damage_in_a_relay_is_refused_with_the_tensor_s_name(make_world, monkeypatch):
    tensors = draw(QWEN, 1)
    world = make_world(QWEN, TrainerGrid(1), EngineLayout(), tensors, engines=2, table=plain_table)
    pack = BufferPayload.pack

    def damaged(payload, start, end, target):
        pack(payload, start, end, target)
        target[7] ^= 1

    monkeypatch.setattr(BufferPayload, "pack", damaged)
    world.send(1)
    for receiver in world.receivers.values():
        with raised(ValueError, "engine"):
            receiver.received_chunks.wait(1, PATIENT)


def wait_without_rank_3(world):
    """What trainer rank 3 sends to fails, naming it; all others are complete."""
    positions = {rank for (_, rank), r in world.receivers.items() if 3 in r.received_chunks.chunks}
    for place, receiver in world.receivers.items():
        if place[1] not in positions:
            receiver.received_chunks.wait(1, PATIENT)
            continue
        with pytest.raises(ValueError, match="trainer ranks? 3[^0-9,]"):
            receiver.received_chunks.wait(1, PATIENT)


@pytest.mark.more  # waits for the time that honest ranks may need on a slow machine
def test_a_trainer_rank_that_does_not_send_is_named_on_all_engines(make_world):
    tensors = draw(DEEPSEEK, 1)
    world = make_world(DEEPSEEK, GRID, SPREAD, tensors, engines=2, seconds=30, table=plain_table)
    world.send(1, ranks=(0, 1, 2))
    wait_without_rank_3(world)


def test_a_trainer_rank_that_ends_is_named_on_all_engines(make_world):
    tensors = draw(DEEPSEEK, 1)
    world = make_world(DEEPSEEK, GRID, SPREAD, tensors, engines=2, table=plain_table)
    world.senders[3].disconnect(world.name)
    world.send(1, ranks=(0, 1, 2))
    wait_without_rank_3(world)


def test_an_engine_rank_that_ends_is_named_by_the_others(make_world):
    tensors = draw(DEEPSEEK, 1)
    world = make_world(DEEPSEEK, GRID, SPREAD, tensors, engines=3, table=plain_table)
    world.receivers[1, 2].close()
    world.send(1)
    for engine in (0, 2):
        with raised(ValueError, "engine 1 of the set, rank 2"):
            world.receivers[engine, 2].received_chunks.wait(1, PATIENT)


def test_engines_that_need_different_tensors_are_refused(make_world):
    tensors, layouts = draw(QWEN, 1), iter([EngineLayout(), EngineLayout(tensor_parallel=2)])
    with raised(EngineSetFailedError, "rank 0 of engine 1"):
        make_world(
            QWEN,
            TrainerGrid(1),
            EngineLayout(),
            tensors,
            engines=2,
            table=lambda hf_config, _, rank: plain_table(hf_config, next(layouts), rank),
        )
