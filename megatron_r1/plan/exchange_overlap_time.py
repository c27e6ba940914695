"""Seconds and bytes of the exchange of tokens between experts' ranks where it is overlapped.

`parallel.overlap_expert_exchange` and layers recomputed whole exclude each other (Megatron 0.19.2):
both are compared.

In a combined pass each of a layer's four all-to-alls has one part of the other micro-batch's layer
to hide behind (model_chunk_schedule_plan.py, TransformerLayerSchedulePlan.run, Megatron-Core
0.19.2): the gradients' way to the experts behind attention forward, the tokens' way there behind
the experts' backward pass, the gradients' way back behind the experts forward, the tokens' way back
behind attention backward. Attention stands for all but the routed experts, shared experts included.
The forward passes of the warm-up and the backward passes of the drain have no other micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import prod

from megatron_r1.config import ParallelConfig
from megatron_r1.models.exchange_overlap_checks import overlap_conflicts
from megatron_r1.models.memory import LayerActivations
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity

OVERLAPPED_EXCHANGE, FULL_RECOMPUTE = "overlap, selective", "none, full"
BACKWARD = 2
"""A backward pass in forward passes; what is recomputed selectively is not counted."""


def expert_flops(job: PlannedJob, layer: int) -> float:
    """Return forward FLOP of one token in the routed experts of a decoder layer."""
    rules = (rule for rule in job.weight_table.layers[layer] if rule.is_expert)
    values = sum(prod(source.shape) for rule in rules for source in rule.sources)
    return 2 * values * job.hf_config["num_experts_per_tok"]


def exposed_seconds(transfer_seconds: float, attention: float, experts: float) -> float:
    """Return seconds of a layer's four all-to-alls that a combined pass does not hide.

    Args:
        transfer_seconds: those of one all-to-all.
        attention: seconds of the forward pass outside the routed experts.
        experts: seconds of the routed experts' forward pass."""
    compute_seconds = (attention, BACKWARD * experts, experts, BACKWARD * attention)
    return sum(max(0.0, transfer_seconds - hidden_seconds) for hidden_seconds in compute_seconds)


def unpaired_fraction(job: PlannedJob, pipeline_rank: int) -> float:
    """Return the share of passes that are combined with no other: those of the warm-up, one more
    than without the overlap (schedules.py, get_pp_rank_microbatches)."""
    pipeline, virtual = job.parallel.pipeline, job.num_model_chunks
    num_unpaired = 1
    if pipeline > 1:
        num_unpaired += 2 * (pipeline - pipeline_rank - 1) + (virtual - 1) * pipeline
    return min(1.0, num_unpaired / (virtual * job.schedule_slots))


def working_bytes(layer: LayerActivations, parallel: ParallelConfig) -> int:
    """Return the bytes that the layers in work add.

    One is in its backward pass and, in a combined pass, one of the other micro-batch in its forward
    pass, before anything of the first is freed."""
    forward_bytes = (
        layer.saved_bytes(parallel) + layer.dispatch if parallel.overlap_expert_exchange else 0
    )
    return layer.backward_bytes(parallel) + forward_bytes


@dataclass(frozen=True)
class StepEstimate:
    """What a job takes on its busiest and on its fullest pipeline rank.

    Attributes:
        step: seconds of an optimizer step.
        exposed_seconds: seconds of the exchange of a micro-batch that nothing hides.
        unpaired_fraction: share of passes that are combined with no other.
        peak: bytes of the fullest rank."""

    step: float
    exposed_seconds: float
    unpaired_fraction: float
    peak: int


def exchange_choice(
    job: PlannedJob, estimate_step: Callable[[PlannedJob], StepEstimate]
) -> QuantityTable:
    """Return the seconds and memory of an optimizer step with the exchange hidden, and with layers
    recomputed whole.

    Selective recomputation goes with the first. {} where experts are on one rank.

    Args:
        job: the planned job, for everything else.
        estimate_step: estimates a job that differs from it in `parallel` alone."""
    if not job.has_experts or job.parallel.expert == 1:
        return {}
    recomputing_job = job.with_parallel(overlap_expert_exchange=False, recompute="full")
    jobs = {OVERLAPPED_EXCHANGE: _with_overlap(job), FULL_RECOMPUTE: recomputing_job}
    if conflicts := list(
        islice(overlap_conflicts(jobs[OVERLAPPED_EXCHANGE].config, job.hf_config), 1)
    ):
        reason = f"not possible with {conflicts[0].setting}: {conflicts[0].reason}"
        return {
            OVERLAPPED_EXCHANGE: Quantity(None, "s", reason),
            FULL_RECOMPUTE: _step_row(recomputing_job, estimate_step(recomputing_job)),
        }
    estimates = {name: estimate_step(alternative) for name, alternative in jobs.items()}
    section = {name: _step_row(jobs[name], estimate) for name, estimate in estimates.items()}
    ratio = estimates[FULL_RECOMPUTE].step / estimates[OVERLAPPED_EXCHANGE].step
    fitting_names = [
        name for name, estimate in estimates.items() if estimate.peak <= job.hardware.memory
    ]
    verdict = {
        0: "neither fits",
        1: f"only '{fitting_names[0]}' fits" if fitting_names else "",
        2: "both fit",
    }
    formula = f"{FULL_RECOMPUTE} / {OVERLAPPED_EXCHANGE}; {verdict[len(fitting_names)]}"
    return section | {"saved time": Quantity(ratio, "x", formula)}


def _with_overlap(job: PlannedJob) -> PlannedJob:
    """Return the job with the overlap: with its own modules, or those of DeepSeek-V3's report
    (section 3.2.3)."""
    modules = job.parallel.recompute_modules
    if job.parallel.recompute != "selective" or "moe" in modules:
        modules = ["layernorm", *["mla_up_proj"] * job.latent_attention, "moe_act"]
    return job.with_parallel(
        overlap_expert_exchange=True, recompute="selective", recompute_modules=modules
    )


def _step_row(job: PlannedJob, estimate: StepEstimate) -> Quantity:
    parallel = job.parallel
    peak, memory = byte_quantity(estimate.peak), byte_quantity(job.hardware.memory)
    verdict = "fits" if estimate.peak <= job.hardware.memory else "does not fit"
    modules = (
        "every layer" if parallel.recompute == "full" else ", ".join(parallel.recompute_modules)
    )
    formula = (
        f"an optimizer step; {peak} of {memory} on the fullest rank: {verdict}. "
        f"Recomputed: {modules}. {estimate.exposed_seconds:.2g} s of the exchange of a "
        "micro-batch exposed"
    )
    if parallel.overlap_expert_exchange:
        formula += f", {1 - estimate.unpaired_fraction:.0%} of its passes combined with another's"
    return Quantity(estimate.step, "s", formula)
