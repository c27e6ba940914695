"""The exchange of tokens with experts' ranks behind the computation of another micro-batch
(`parallel.overlap_expert_exchange`): what of it stays exposed, and the memory that it takes.

In a combined pass each of a layer's four all-to-alls has one part of the other micro-batch's layer
to hide behind (model_chunk_schedule_plan.py, TransformerLayerSchedulePlan.run, Megatron-Core
0.16.1): the gradients' way to the experts behind attention forward, the tokens' way there behind
the experts' backward pass, the gradients' way back behind the experts forward, the tokens' way back
behind attention backward. Attention stands for all but the routed experts, shared experts included.
The forward passes of the warm-up and the backward passes of the drain have no other micro-batch.
"""

from math import prod

from megatron_r1.config import ParallelConfig
from megatron_r1.models.memory import Layer
from megatron_r1.plan.job import PlannedJob

BACKWARD = 2
"""A backward pass in forward passes; what is recomputed selectively is not counted."""


def expert_flops(job: PlannedJob, layer: int) -> float:
    """Return forward FLOP of one token in the routed experts of a decoder layer."""
    rules = (rule for rule in job.weight_table.layers[layer] if rule.expert)
    values = sum(prod(source.shape) for rule in rules for source in rule.sources)
    return 2 * values * job.hf["num_experts_per_tok"]


def exposed_seconds(once: float, attention: float, experts: float) -> float:
    """Return seconds of a layer's four all-to-alls that a combined pass does not hide.

    Args:
        once: seconds of one all-to-all.
        attention: seconds of the forward pass outside the routed experts.
        experts: seconds of the routed experts' forward pass."""
    behind = (attention, BACKWARD * experts, experts, BACKWARD * attention)
    return sum(max(0.0, once - each) for each in behind)


def share_alone(job: PlannedJob, pipeline_rank: int) -> float:
    """Return the share of passes that are combined with no other: those of the warm-up, one more
    than without the overlap (schedules.py, get_pp_rank_microbatches)."""
    pipeline, virtual = job.parallel.pipeline, job.virtual
    alone = 1
    if pipeline > 1:
        alone += 2 * (pipeline - pipeline_rank - 1) + (virtual - 1) * pipeline
    return min(1.0, alone / (virtual * job.slots))


def working_bytes(layer: Layer, parallel: ParallelConfig) -> int:
    """Return the bytes that the layers in work add: one in its backward pass and, in a combined
    pass, one of the other micro-batch in its forward pass, before anything of the first is freed.
    """
    forward = layer.kept(parallel) + layer.dispatch if parallel.overlap_expert_exchange else 0
    return layer.backward_bytes(parallel) + forward
