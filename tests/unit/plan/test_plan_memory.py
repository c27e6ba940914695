"""The memory of each trainer rank, on its GPU and on its host."""

import math
from types import SimpleNamespace

import pytest
from planned_jobs import RECIPE, planned, real_job

from megatron_r1.commands.plan import main
from megatron_r1.models import memory, weights
from megatron_r1.models.weights.layout import layout_from_table
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import rank_memory


def test_the_reference_lies_in_host_memory_or_on_the_gpu():
    host, device = (
        rank_memory(planned(parallel__reference_offload=place))[0] for place in ("host", "device")
    )
    assert host.host["reference"] == device.training["reference"] > 0
    assert "reference" not in host.training and "reference" not in device.host


@pytest.mark.parametrize("colocated", [True, False])
def test_gradients_are_the_engines_memory_while_these_compute(colocated):
    estimate = JobEstimate(planned(rollout__colocated=colocated, rl__importance_cap=2.0))
    rank = max(estimate.ranks, key=lambda rank: rank.resident_bytes)
    kinds = ["parameters", "optimizer"] + ["gradients"] * (not colocated)
    assert estimate.engines.trainer_bytes == sum(rank.training[kind] for kind in kinds)
    assert ("gradients" in rank.logprobs) != colocated and "gradients" in rank.training


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("reference", {"parallel__reference_offload": "device"}),
        ("fp8 copies", {"fp8__recipe": "blockwise"}),
    ],
)
def test_all_that_the_trainer_keeps_on_a_gpu_is_not_the_engines(kind, changed):
    estimate = JobEstimate(planned(**changed, rollout__gpu_memory=None))
    plain = JobEstimate(planned())
    more = max(rank.training.get(kind, 0) for rank in estimate.ranks)
    assert estimate.engines.trainer_bytes > plain.engines.trainer_bytes + more / 2 > 0


def test_constants_taken_from_the_kernels_are_theirs():
    from r1_kernels import linear_head

    for name in ("GPU_CHUNK_TOKENS", "GPU_CHUNK_ELEMENTS", "CPU_CHUNK_ELEMENTS"):
        assert getattr(memory, name) == getattr(linear_head, name)


def test_more_ranks_never_need_more_of_one_gpu():
    peaks = {}
    for expert in (4, 8, 16):
        peaks[expert] = max(rank.resident_bytes for rank in rank_memory(real_job(expert=expert)))
    assert peaks[4] > peaks[8] > peaks[16]


def test_bf16_moments_take_two_bytes_each(capsys):
    estimates = []
    for moments in ("float32", "bfloat16"):
        assert main([str(RECIPE), "--optimizer.moments", moments]) == 0
        estimates.append(capsys.readouterr().out)
    assert "12 B x (dense" in estimates[0] and "8 B x (dense" in estimates[1]


def test_adapters_alone_have_gradients_an_optimizer_and_a_reference():
    whole, lora = (rank_memory(planned(**{"model.lora": x}))[1] for x in (None, {"rank": 16}))
    job = planned(**{"model.lora": {"rank": 16}})
    layers = [layer for chunk in job.pipeline_stages[1] for layer in chunk.layers]
    held = sum(
        math.prod(entry.shape)
        for layer in layers
        for entry in layout_from_table(job.adapters, rank_shard(job, layer)).values()
    )
    assert lora.counts.trained == held > 0
    assert lora.counts.frozen == whole.counts.parameters
    assert lora.training["gradients"] < 0.02 * whole.training["gradients"]
    assert lora.training["optimizer"] < 0.02 * whole.training["optimizer"]
    buffers = 4 * lora.counts.buffers  # the routers' bias
    assert lora.host["reference"] == held * job.parameter_bytes + buffers
    assert lora.host["checkpoint being written"] < 0.02 * whole.host["checkpoint being written"]
    assert lora.training["parameters"] > whole.training["parameters"]


def rank_shard(job: PlannedJob, layer: int) -> weights.Shard:
    parallel = job.parallel
    sizes = {"tp": parallel.tensor, "ep": parallel.expert, "etp": parallel.expert_tensor}
    return weights.Shard((layer,), **{axis: (0, size) for axis, size in sizes.items()})


@pytest.mark.parametrize(("tensor", "per_logit"), [(1, 4), (2, 8)])
def test_in_fp32_the_heads_gradient_has_a_buffer_of_its_own_with_tensor_ranks(tensor, per_logit):
    """`r1_kernels.fused_policy_loss` writes it over the logits on a rank alone."""
    config = SimpleNamespace(
        parallel=SimpleNamespace(context=1, tensor=tensor),
        model=SimpleNamespace(dtype="float32", lora=None),
    )
    columns, hidden, tokens = 50_000 // tensor, 64, 1_000
    counted, _ = memory.head_bytes((50_000, hidden), config, tokens, on_gpu=True, has_experts=False)
    states, gradient = tokens * hidden * (4 + 4), columns * hidden * (4 + 4)
    assert counted == tokens * columns * per_logit + states + gradient
