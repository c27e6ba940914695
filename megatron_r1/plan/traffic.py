"""The bytes that a trainer rank sends, by parallel axis, and the time that takes on the axis's
slowest link.

Bytes sent by one rank: an all-gather or reduce-scatter of X bytes over n ranks sends X (n - 1) /
n, an all-to-all the share for other ranks. Ranks are laid out as in Megatron: tensor, context,
data, pipeline from the inside out; expert groups span the first three."""

import math
from dataclasses import dataclass

from megatron_r1.config.hardware import link_rate
from megatron_r1.models.hf_config import head_sizes, key_value_heads
from megatron_r1.models.memory import BYTES, Counts
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.exchange import copies_of_token
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Section, byte_quantity
from megatron_r1.reporting.wording import counted

VALUE = BYTES["bfloat16"]
"""Bytes of an activation that is sent."""


@dataclass(frozen=True)
class AxisTraffic:
    """Traffic of one parallel axis on one rank of the busiest pipeline stage.

    Attributes:
        size: the number of ranks of a group.
        span: the ranks from the first to the last of a group, which decides whether it fits a
            node.
        formula: how the bytes were computed, as the report shows it.
        microbatch: bytes sent for one micro-batch, forward and backward.
        forward: bytes of `microbatch` that are sent in the forward pass.
        step: bytes sent once per optimizer step.
    """

    size: int
    span: int
    formula: str
    microbatch: float = 0
    forward: float = 0
    step: float = 0

    def seconds(self, job: PlannedJob, num_bytes: float) -> float:
        """Return the seconds in which `num_bytes` cross the links of a group of this axis."""
        return num_bytes / link_rate(job.hardware, job.assumptions, self.span)


def traffic_by_axis(job: PlannedJob, rank: int) -> dict[str, AxisTraffic]:
    """Return every axis with more than one rank, on pipeline rank `rank`."""
    dense, sparse = job.layers(rank)
    axes = {
        "tensor": _tensor(job, dense + sparse),
        "context": _context(job, dense + sparse),
        "expert": _expert(job, sparse),
        "pipeline": _pipeline(job),
        "data": _data(job, RankCounts(job).rank_counts(rank)),
    }
    return {name: group for name, group in axes.items() if group and group.size > 1}


def _tensor(job: PlannedJob, layers: int) -> AxisTraffic:
    hf, size, whole = job.hf, job.parallel.tensor, job.rank_tokens
    hidden, fraction = hf["hidden_size"], (size - 1) / size
    gathered = scattered = 2 * hidden
    if job.latent_attention:
        gathered = hidden + (hf.get("q_lora_rank") or hidden) + hf["kv_lora_rank"]
    forward = layers * (gathered + scattered) * whole * VALUE * fraction
    backward = layers * (2 * gathered + scattered) * whole * VALUE * fraction
    again = forward if job.parallel.recompute == "full" else 0
    formula = (
        f"{counted(layers, 'layer')} x (gather {gathered} + scatter {scattered} values) x "
        f"{whole:,.0f} tokens x {VALUE} B x {fraction:.2f}, backward with the gathers once more"
    )
    return AxisTraffic(size, size, formula, forward + backward + again, forward)


def _context(job: PlannedJob, layers: int) -> AxisTraffic:
    hf, size, whole = job.hf, job.parallel.context, job.rank_tokens
    # With fewer key and value heads than tensor ranks, several ranks send the same one.
    heads = max(key_value_heads(hf), job.parallel.tensor)
    values = heads * sum(head_sizes(hf)) / job.parallel.tensor
    forward = layers * values * whole * (size - 1) * VALUE
    again = job.parallel.recompute == "full"
    formula = (
        f"{counted(layers, 'layer')} x {values:,.0f} key and value features x {whole:,.0f} "
        f"tokens x {counted(size - 1, 'other rank')} x {VALUE} B; backward: again, and their "
        "gradients"
    )
    return AxisTraffic(size, size * job.parallel.tensor, formula, (3 + again) * forward, forward)


def _expert(job: PlannedJob, sparse: int) -> AxisTraffic | None:
    if not sparse:
        return None
    parallel, size, split = job.parallel, job.parallel.expert, job.split(job.rank_tokens)
    chosen = job.hf["num_experts_per_tok"]
    span, nodes = size * parallel.expert_tensor, job.hf.get("topk_group") or math.inf
    copies, what = chosen, "experts"
    if parallel.dispatcher == "flex":
        spread = -(-span // job.hardware.gpus_per_node)
        copies = copies_of_token(size, spread, chosen, nodes)
        what = "nodes (DeepEP)" if spread > 1 else "ranks (DeepEP)"
    routed = copies * split * job.assumptions.expert_imbalance
    once = sparse * routed * job.hf["hidden_size"] * VALUE * (size - 1) / size
    recomputed = parallel.recompute == "selective" and "moe" in parallel.recompute_modules
    times = 6 if parallel.recompute == "full" or recomputed else 4
    formula = (
        f"{counted(sparse, 'layer')} x {copies:.3g} {what} x {split:,.0f} tokens x "
        f"{job.hf['hidden_size']} x {VALUE} B x {(size - 1) / size:.2f} x imbalance "
        f"{job.assumptions.expert_imbalance}, out and back, {times} times"
    )
    return AxisTraffic(size, span, formula, times * once, 2 * once)


def _pipeline(job: PlannedJob) -> AxisTraffic:
    split = job.split(job.rank_tokens)
    once = split * job.hf["hidden_size"] * VALUE * job.num_model_chunks
    formula = (
        f"{split:,.0f} tokens x {job.hf['hidden_size']} x {VALUE} B x "
        f"{counted(job.num_model_chunks, 'chunk')}, states forward and gradients backward"
    )
    return AxisTraffic(job.parallel.pipeline, job.world_size, formula, 2 * once, once)


def _data(job: PlannedJob, counts: Counts) -> AxisTraffic:
    value = job.parameter_bytes
    dense, expert = job.data_context_parallel, job.expert_data_parallel
    moved = counts.dense * (dense - 1) / dense + counts.expert * (expert - 1) / expert
    formula = (
        f"gradients reduce-scattered in fp32, parameters gathered in {value} B: {counts.dense:,} "
        f"dense over {dense}, {counts.expert:,} expert over {expert} ranks"
    )
    span = job.world_size // job.parallel.pipeline
    return AxisTraffic(dense, span, formula, step=moved * (4 + value))


def communication_section(job: PlannedJob, rank: int) -> Section:
    """Return the bytes that one rank of pipeline rank `rank` sends per optimizer step, by group."""
    return {
        f"{name} ({group.size} ranks)": byte_quantity(
            group.microbatch * job.num_microbatches + group.step,
            (f"{counted(job.num_microbatches, 'micro-batch')} x " if group.microbatch else "")
            + group.formula,
        )
        for name, group in traffic_by_axis(job, rank).items()
    }
