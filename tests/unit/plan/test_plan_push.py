"""Engines and pushes as megatron-r1 plan lays them out and prices them."""

from dataclasses import replace

import pytest
from planned_jobs import RECIPE, ROOT, V3, planned

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import planned_engine_layout, push_section
from megatron_r1.plan.push_traffic import traffic_of_sets


def test_an_engine_is_laid_out_as_the_recipe_says_or_as_vllm_serves_such_models():
    config = configuration.load_recipe(RECIPE)
    given = planned_engine_layout(PlannedJob(V3, config, 2048, HARDWARE["H800"]))
    assert (given.tensor_parallel, given.data_parallel, given.expert_parallel) == (8, 16, True)
    changed = {"rollout.tensor_parallel": 16, "rollout.data_parallel": 8}
    wide = planned_engine_layout(
        PlannedJob(V3, configuration.load_recipe(RECIPE, changed), 2048, HARDWARE["H800"])
    )
    assert (wide.tensor_parallel, wide.data_parallel, wide.engines) == (16, 8, 16)
    silent = {
        "rollout.tensor_parallel": 1,
        "rollout.data_parallel": 1,
        "rollout.expert_parallel": False,
    }
    assumed = planned_engine_layout(
        PlannedJob(V3, configuration.load_recipe(RECIPE, silent), 2048, HARDWARE["H800"])
    )
    assert assumed == given


@pytest.mark.more
def test_an_fp8_push_is_planned_with_fp8_s_bytes_and_its_engines_with_fp8_weights():
    gloo = {"push__transport": "gloo"}
    plain, fp8 = (
        JobEstimate(planned(push__fp8=value, **gloo)).sections() for value in (False, True)
    )
    assert plain["push"]["in FP8"].value == fp8["push"]["into an engine GPU"].value
    assert "in FP8" not in fp8["push"] and "FP8" in fp8["push"]["into an engine GPU"].formula
    for name in ("into an engine GPU", "into all engines", "receive buffer"):
        assert fp8["push"][name].value < 0.55 * plain["push"][name].value, name
    assert fp8["push"]["out of a trainer rank"].value < plain["push"]["out of a trainer rank"].value
    assert fp8["push"]["over what is needed"].value == 1
    seconds = [plan["time"]["push"].value for plan in (plain, fp8)]
    assert seconds[1] == pytest.approx(fp8["push"]["into an engine GPU"].value / 1.2e9)
    assert seconds[1] < 0.55 * seconds[0]
    gpu = [plan["engine memory of a GPU"] for plan in (plain, fp8)]
    freed = gpu[0]["weights"].value - gpu[1]["weights"].value
    assert gpu[1]["weights"].value == fp8["push"]["into an engine GPU"].value
    # Of the data ranks' tokens hidden states and what experts compute, with scales; before in bf16.
    more = 16 * 1024 * ((7168 + 8 * 2048) * (128 + 4) // 128 - 2 * 7168)
    assert gpu[1]["KV cache"].value - gpu[0]["KV cache"].value == freed - more > 7e9


def test_a_push_of_adapters_alone_is_planned_with_their_bytes():
    settings = {"model.lora.rank": 16, "rollout.colocated": False, "rollout.engines": 2}
    hf_config = read_hf_config(ROOT / "examples/one_node/model")

    def sections(adapter_only):
        changed = settings | {"push.adapter_only": adapter_only}
        config = configuration.load_recipe(ROOT / "examples/one_node/qwen2.5-7b.yaml", changed)
        return JobEstimate(
            PlannedJob(hf_config, config, 4, HARDWARE["H100"], rollout_gpus=4)
        ).sections()

    merged, alone = map(sections, (False, True))
    hidden, inner, kv, layers, rank = 3584, 18944, 512, 28, 16
    widths = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    num_bytes = 2 * rank * layers * widths
    for name in ("into an engine GPU", "receive buffer", "out of a trainer rank"):
        assert alone["push"][name].value == num_bytes, name
    assert "in FP8" in merged["push"] and "in FP8" not in alone["push"]
    weights, pushed = (part["engine memory of a GPU"]["weights"].value for part in (alone, merged))
    assert weights - pushed == 3 * num_bytes  # rank 16 is one of vLLM's
    ratio = alone["time"]["push"].value / merged["time"]["push"].value
    assert ratio == pytest.approx(num_bytes / merged["push"]["into an engine GPU"].value)


@pytest.mark.parametrize("transport", ["shm", "gloo", "cuda_ipc"])
def test_the_receive_buffer_is_where_the_transport_writes(transport):
    any_share = {"rollout__gpu_memory": None}
    estimate = JobEstimate(planned(push__transport=transport, **any_share))
    sections, buffer = estimate.sections(), estimate.engines.weight_bytes
    assert sections["push"]["receive buffer"].value == buffer
    formula = sections["push"]["receive buffer"].formula
    assert f"({transport})" in formula
    assert ("is for one host" in formula) == (transport in ("shm", "cuda_ipc"))
    default = JobEstimate(planned(push__transport="gloo", **any_share))
    before = default.engines.cache_bytes
    trainer = sections[f"memory of pipeline rank {estimate.peak_rank.rank}, the fullest"]
    host = sections["host memory of a node"]
    if transport == "cuda_ipc":
        assert "receive buffer" not in host and "on its GPU" in formula
        assert before - estimate.engines.cache_bytes == trainer["receive buffer"].value == buffer
        assert estimate.peak_rank.peak_bytes == default.peak_rank.peak_bytes + buffer
    else:
        assert host["receive buffer"].value == 8 * buffer and "on its host" in formula
        assert estimate.engines.cache_bytes == before and "receive buffer" not in trainer


def test_over_nccl_colocated_engines_receive_in_the_place_of_their_cache():
    """Weights in transit, and two rounds of 64 MiB each way."""
    estimate = JobEstimate(planned(push__transport="nccl"))
    sections, engines = estimate.sections(), estimate.engines
    assert "in the place of its KV cache" in sections["push"]["receive buffer"].formula
    assert not engines.receive_buffer_bytes and estimate.problems() == []
    for section in sections.values():
        assert "receive buffer" not in section or section is sections["push"]
    needed = engines.weight_bytes + GIB // 4
    used = engines.weight_bytes + engines.pass_bytes()
    gpu = used + engines.trainer_bytes + 6 * GIB + needed
    hardware = replace(HARDWARE["H800"], memory=gpu - GIB)
    fits_engine = planned(push__transport="nccl", rollout__gpu_memory=None)
    share, push = JobEstimate(replace(fits_engine, hardware=hardware)).problems()[-2:]
    assert "rollout.gpu_memory is not set, and vLLM takes 0.92" in share
    assert "a push over nccl needs 20.10 GiB" in push and "which has 19.10 GiB" in push
    assert "set rollout.gpu_memory" not in push  # the trainer leaves no larger share


def test_receive_buffers_of_engines_on_their_own_gpus_are_not_the_trainers():
    alone = {"rollout_gpus": 2048, "rollout__colocated": False}
    host = JobEstimate(planned(**alone, push__transport="gloo")).sections()
    assert "receive buffer" not in host["host memory of a node"]
    engines = host["host memory of an engines' node"]["receive buffer"]
    assert engines.value == 8 * host["push"]["receive buffer"].value
    estimate = JobEstimate(planned(**alone, push__transport="cuda_ipc"))
    assert estimate.peak_rank.peak_bytes == JobEstimate(planned(**alone)).peak_rank.peak_bytes
    assert estimate.engines.receive_buffer_bytes == estimate.engines.weight_bytes
    assert "host memory of an engines' node" not in estimate.sections()


def test_over_nccl_engines_of_their_own_gpus_leave_room_for_what_a_push_receives():
    """79 GiB without 19.85: vLLM may take 59.15 of them."""
    alone = {"rollout_gpus": 2048, "rollout__colocated": False}
    for share, shown in ((0.75, "=0.75"), (None, " is not set, and vLLM takes 0.92")):
        (problem,) = JobEstimate(planned(**alone, rollout__gpu_memory=share)).problems()
        assert problem.startswith(f"rollout.gpu_memory{shown}: of each GPU's 79.00 GiB")
        assert "a push's 19.85 GiB leaves engines 59.15 GiB: set at most 0.74" in problem
    assert JobEstimate(planned(**alone, rollout__gpu_memory=0.74)).problems() == []
    gloo = JobEstimate(planned(**alone, rollout__gpu_memory=0.9, push__transport="gloo"))
    assert gloo.problems() == []  # on the host


def test_a_receive_buffer_that_does_not_fit_is_named_with_its_remedy():
    hardware = replace(HARDWARE["H800"], memory=50 * GIB)
    job = replace(planned(push__transport="cuda_ipc"), hardware=hardware)
    trainer, _, cache = JobEstimate(job).problems()
    assert "pipeline rank 3 needs 71.26 GiB of 50.00 GiB" in trainer
    assert "19.85 GiB of receive buffer" in cache and "push.transport to gloo" in cache
    hardware = replace(HARDWARE["H800"], host_memory=15 * GIB)
    alone = {"rollout_gpus": 2048, "push__transport": "gloo"}
    problem = JobEstimate(replace(planned(**alone), hardware=hardware)).problems()[-1]
    assert (
        "a host needs 158.83 GiB of 120.00 GiB" in problem
        and "of it receive buffer: give each engine more GPUs" in problem
    )


def test_what_a_push_moves_beyond_need_and_how_evenly_is_counted(monkeypatch):
    push = push_section(planned())
    assert push["over what is needed"].value == push["busiest engine GPU"].value == 1
    assert str(push["over what is needed"]) == "1.00 x"
    # One of 128 GPUs with half as much again: 1.5 / (128.5 / 128).
    each = push["into an engine GPU"].value

    def uneven(*arguments, **named):
        return replace(
            traffic_of_sets(*arguments, **named), received_bytes=[1.5 * each] + 127 * [each]
        )

    monkeypatch.setattr("megatron_r1.plan.push_costs.traffic_of_sets", uneven)
    push = push_section(planned())
    assert push["over what is needed"].value == pytest.approx(128.5 / 128)
    assert push["busiest engine GPU"].value == pytest.approx(1.5 / (128.5 / 128))


@pytest.mark.more  # half a minute: the schedule of 2,048 engine ranks, twice
def test_a_push_is_priced_as_sets_of_engines_execute_it(monkeypatch):
    """By hand: 2,048 positions' shares, from the plan's largest; requests by kind of rank; rounds
    of 32 and 64 MiB."""
    push = push_section(planned(push__transport="nccl"))
    with monkeypatch.context() as engines_by_themselves:
        engines_by_themselves.setattr("megatron_r1.plan.push_costs.MAX_SET_ENGINES", 1)
        alone = push_section(planned(push__transport="nccl"))
    whole = push["into an engine GPU"].value
    assert whole / 16 < push["out of a trainer rank"].value < 1.4 * whole / 16
    assert alone["out of a trainer rank"].value > 5 * push["out of a trainer rank"].value
    assert push["links of a rank"].value <= 17
    # An offer, table, plan and rounds of each engine rank, read again by rank 0; two requests of
    # each trainer rank; a communicator of all.
    assert 2048 * (5 + 1 + 2) < push["store requests"].value < 2048 * (5 + 1 + 2) * 1.1
    assert push["set-up"].value == pytest.approx(2048 * 0.084, rel=0.05)
    entering = -(-push["out of a trainer rank"].value // (32 << 20))
    passed_on = 15 * -(-whole // (16 * 64 << 20))
    rounds = 1.04 * entering * (32 << 20) + passed_on * (64 << 20)
    assert rounds / 1.1 < 37.5e9 * push["push"].value < 1.05 * rounds
    assert f"{passed_on:.0f} in which" in push["push"].formula


def test_over_gloo_each_pair_is_a_group_that_asks_the_store():
    push = push_section(planned(push__transport="gloo"))
    # Four requests of each of 4 to 9 pairs into an engine rank, and of its exchange's group.
    assert 2048 * (6 + 1 + 2 + 4 * 4) < push["store requests"].value < 2048 * (6 + 1 + 2 + 4 * 9)
    assert 2.5 < push["set-up"].value < 10


@pytest.mark.parametrize("gpus", [1, 4, 7, 8, 12])
def test_an_assumed_engine_uses_all_its_gpus_and_divides_the_heads(gpus):
    hf_config = read_hf_config(ROOT / "examples/laptop/model")
    config = configuration.load_recipe(ROOT / "examples/laptop/r1_zero.yaml")
    layout = planned_engine_layout(PlannedJob(hf_config, config, gpus, HARDWARE["H800"]))
    assert hf_config["num_attention_heads"] == 2 and layout.tensor_parallel in (1, 2)
    assert layout.tensor_parallel * layout.data_parallel == gpus
    assert layout.tensor_parallel == (2 if gpus % 2 == 0 else 1)
