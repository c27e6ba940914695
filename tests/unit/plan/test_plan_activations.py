"""Activations in flight, against Megatron's own schedule, and by hand."""

from types import SimpleNamespace

import pytest
from planned_jobs import real_job

from megatron_r1.models.memory import layer_activations
from megatron_r1.plan.memory import microbatches_in_flight


@pytest.mark.parametrize(
    "pipeline, virtual, microbatches", [(4, 1, 9), (4, 1, 2), (4, 2, 9), (8, 3, 8)]
)
def test_micro_batches_in_flight_are_those_of_megatron_s_schedule(pipeline, virtual, microbatches):
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        place = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        total, _, warmup, _ = get_pp_rank_microbatches(
            microbatches, virtual, pipeline, p2p_communicator=place
        )
        held = microbatches_in_flight(rank, pipeline, virtual, microbatches)
        forwards = get_schedule_table(microbatches, virtual, pipeline)[: min(total, warmup + 1)]
        chunks = [chunk for _, chunk in forwards]
        assert held == [chunks.count(chunk) for chunk in range(virtual)], rank


def test_recomputing_a_module_frees_its_tensors_and_full_leaves_the_input():
    job = real_job()
    layer = layer_activations(job.hf_config, job.config, job.microbatch_tokens, sparse=True)
    tokens = 33_280 // 2 // 4

    def kept(recompute, *modules):
        changed = job.with_parallel(recompute=recompute, recompute_modules=list(modules))
        return layer.saved_bytes(changed.parallel)

    assert kept("full") == tokens * 7168 * 2
    # Queries and keys of 192 and values of 128, 32 heads of each on a rank, of all its tokens.
    assert kept("none") - kept("selective", "mla_up_proj") == 16_640 * 32 * 512 * 2
    assert kept("selective", "moe") == kept("selective", "moe", "moe_act", "shared_experts")
    assert kept("none") > kept("selective", "moe_act") > kept("selective", "moe") > kept("full")
