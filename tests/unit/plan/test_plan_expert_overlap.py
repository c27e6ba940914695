"""The exchange of tokens with experts, hidden behind computation, in the plan."""

from types import SimpleNamespace

import pytest
from planned_jobs import RECIPE, real_job

from megatron_r1.commands.plan import main
from megatron_r1.plan.estimate import estimate_step
from megatron_r1.plan.exchange_overlap_time import (
    FULL_RECOMPUTE,
    OVERLAPPED_EXCHANGE,
    exchange_choice,
    expert_flops,
    exposed_seconds,
    unpaired_fraction,
)
from megatron_r1.plan.memory import rank_memory
from megatron_r1.plan.step_time import StepTime

SELECTIVE = {"recompute": "selective", "recompute_modules": ["layernorm", "mla_up_proj", "moe_act"]}


def test_an_all_to_all_hides_behind_one_part_of_the_other_micro_batch():
    assert exposed_seconds(1.0, attention=2.0, experts=1.0) == 0
    # Behind attention forward 0.25 of it, experts backward 0.8 and forward 0.4, attention
    # backward 0.5.
    exposed = exposed_seconds(1.0, attention=0.25, experts=0.4)
    assert exposed == pytest.approx(0.75 + 0.2 + 0.6 + 0.5)
    assert exposed_seconds(1.0, attention=0.0, experts=0.0) == 4


def test_the_routed_experts_operations_are_the_published_model_s():
    # 8 of 256 experts of three matrices of 7,168 x 2,048.
    assert expert_flops(real_job(), 3) == 2 * 8 * 3 * 7168 * 2048


@pytest.mark.parametrize(
    ("pipeline", "virtual", "rank", "microbatches"), [(1, 1, 0, 7), (2, 2, 0, 8), (4, 2, 1, 16)]
)
def test_the_passes_that_run_alone_are_those_of_megatron_s_warm_up(
    pipeline, virtual, rank, microbatches
):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: rank)
    communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
    warmup = 1
    if pipeline > 1:
        _, _, warmup, _ = get_pp_rank_microbatches(
            microbatches,
            virtual,
            pipeline,
            overlap_moe_expert_parallel_comm=True,
            p2p_communicator=communicator,
        )
    job = SimpleNamespace(
        parallel=SimpleNamespace(pipeline=pipeline),
        num_model_chunks=virtual,
        schedule_slots=microbatches,
    )
    assert unpaired_fraction(job, rank) == warmup / (virtual * microbatches)


def test_the_overlap_hides_time_and_takes_the_memory_of_a_second_layer():
    layout = {**SELECTIVE, "pipeline": 4, "pipeline_layout": None, "tokens_per_microbatch": 8704}
    without, hidden = real_job(**layout), real_job(**layout, overlap_expert_exchange=True)
    times = [StepTime(job, None) for job in (without, hidden)]
    rank = times[0].busiest_rank
    sent = times[0].traffic_by_axis(rank)["expert"]
    assert times[0].expert_exchange_seconds(rank) == sent.seconds(without, sent.microbatch_bytes)
    assert 0 < times[1].expert_exchange_seconds(rank) < times[0].expert_exchange_seconds(rank)
    assert times[1].optimizer_step_seconds() < times[0].optimizer_step_seconds()
    assert times[1].logprobs_seconds() == times[0].logprobs_seconds(), (
        "there is no other pass to hide behind"
    )
    for plain, more in zip(rank_memory(without), rank_memory(hidden), strict=True):
        changed = {kind for kind in plain.training if plain.training[kind] != more.training[kind]}
        assert changed == {"layer in work"}
        assert more.training["layer in work"] > plain.training["layer in work"]


def test_a_row_compares_it_with_full_recomputation_and_says_which_fits():
    job = real_job()  # recompute: full
    section = exchange_choice(job, estimate_step)
    # 16 micro-batches of two chunks: on rank 3 of 16 all 32 passes are the warm-up's.
    assert section[OVERLAPPED_EXCHANGE].formula.endswith("0% of its passes combined with another's")
    assert section[FULL_RECOMPUTE].number == StepTime(job, None).optimizer_step_seconds()
    assert (
        "does not fit" in section[OVERLAPPED_EXCHANGE].formula
        and ": fits" in section[FULL_RECOMPUTE].formula
    )
    assert f"only '{FULL_RECOMPUTE}' fits" in section["saved time"].formula
    ratio = section[FULL_RECOMPUTE].number / section[OVERLAPPED_EXCHANGE].number
    assert section["saved time"].number == ratio > 1
    wide = real_job(expert=64, tensor=8, context=4, pipeline=8, pipeline_layout=None)
    assert "both fit" in exchange_choice(wide, estimate_step)["saved time"].formula
    dense = real_job(expert=1, expert_tensor=8)
    assert exchange_choice(dense, estimate_step) == {}


def test_what_prevents_the_overlap_is_in_its_row_and_ends_the_plan(capsys):
    job = real_job(virtual_pipeline=1, pipeline_layout=None)
    section = exchange_choice(job, estimate_step)
    assert (
        section[OVERLAPPED_EXCHANGE].value is None
        and "parallel.pipeline: 16" in section[OVERLAPPED_EXCHANGE].formula
    )
    assert main([str(RECIPE), "--parallel.overlap_expert_exchange", "true"]) == 1
    assert "parallel.recompute: full" in capsys.readouterr().out
