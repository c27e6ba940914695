"""The bytes that a trainer rank sends, by parallel axis, and their time on an axis's slowest link.

An all-gather or reduce-scatter of X bytes over n ranks sends X (n - 1) / n, an all-to-all the share
for other ranks. Ranks are laid out as in Megatron: tensor, context, data, pipeline from the inside
out; expert groups span the first three."""

import math
from dataclasses import dataclass

from megatron_r1.models.hf_config import head_sizes, key_value_heads
from megatron_r1.models.memory import BYTES, ParameterCounts
from megatron_r1.plan.assumptions import link_rate
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.engine_communication import copies_of_token
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import QuantityTable, byte_quantity
from megatron_r1.reporting.formatting import format_count

ACTIVATION_BYTES = BYTES["bfloat16"]
"""Bytes of an activation that is sent."""


@dataclass(frozen=True)
class AxisTraffic:
    """Traffic of one parallel axis on one rank of the busiest pipeline stage.

    Attributes:
        size: the number of ranks of a group.
        span: the ranks from the first to the last of a group, which decides whether it fits a
            node.
        formula: how the bytes were computed, as the report shows it.
        microbatch_bytes: bytes sent for one micro-batch, forward and backward.
        forward_bytes: bytes of `microbatch_bytes` that are sent in the forward pass.
        step_bytes: bytes sent once per optimizer step.
    """

    size: int
    span: int
    formula: str
    microbatch_bytes: float = 0
    forward_bytes: float = 0
    step_bytes: float = 0

    def seconds(self, job: PlannedJob, num_bytes: float) -> float:
        """Return the seconds in which `num_bytes` cross the links of a group of this axis."""
        return num_bytes / link_rate(job.hardware, job.assumptions, self.span)


def traffic_by_axis(job: PlannedJob, rank: int) -> dict[str, AxisTraffic]:
    """Return every axis with more than one rank, on pipeline rank `rank`."""
    dense, sparse = job.num_layers_of_kinds(rank)
    axes = {
        "tensor": _tensor_traffic(job, dense + sparse),
        "context": _context_traffic(job, dense + sparse),
        "expert": _expert_traffic(job, sparse),
        "pipeline": _pipeline_traffic(job),
        "data": _data_parallel_traffic(job, RankCounts(job).rank_counts(rank)),
    }
    return {name: group for name, group in axes.items() if group and group.size > 1}


def _tensor_traffic(job: PlannedJob, layers: int) -> AxisTraffic:
    hf_config, size, tokens = job.hf_config, job.parallel.tensor, job.mean_microbatch_tokens
    hidden_size, fraction = hf_config["hidden_size"], (size - 1) / size
    gathered_values = scattered_values = 2 * hidden_size
    if job.latent_attention:
        gathered_values = (
            hidden_size + (hf_config.get("q_lora_rank") or hidden_size) + hf_config["kv_lora_rank"]
        )
    forward_bytes = (
        layers * (gathered_values + scattered_values) * tokens * ACTIVATION_BYTES * fraction
    )
    backward_bytes = (
        layers * (2 * gathered_values + scattered_values) * tokens * ACTIVATION_BYTES * fraction
    )
    recomputed_bytes = forward_bytes if job.parallel.recompute == "full" else 0
    formula = (
        f"{format_count(layers, 'layer')} x (gather {gathered_values} + scatter {scattered_values} "
        f"values) x {tokens:,.0f} tokens x {ACTIVATION_BYTES} B x {fraction:.2f}, backward with "
        "the gathers once more"
    )
    return AxisTraffic(
        size, size, formula, forward_bytes + backward_bytes + recomputed_bytes, forward_bytes
    )


def _context_traffic(job: PlannedJob, layers: int) -> AxisTraffic:
    hf_config, size, tokens = job.hf_config, job.parallel.context, job.mean_microbatch_tokens
    # With fewer key and value heads than tensor ranks, several ranks send the same one.
    heads = max(key_value_heads(hf_config), job.parallel.tensor)
    values = heads * sum(head_sizes(hf_config)) / job.parallel.tensor
    forward_bytes = layers * values * tokens * (size - 1) * ACTIVATION_BYTES
    recomputes = job.parallel.recompute == "full"
    formula = (
        f"{format_count(layers, 'layer')} x {values:,.0f} key and value features x {tokens:,.0f} "
        f"tokens x {format_count(size - 1, 'other rank')} x {ACTIVATION_BYTES} B; backward: again, "
        "and their gradients"
    )
    return AxisTraffic(
        size, size * job.parallel.tensor, formula, (3 + recomputes) * forward_bytes, forward_bytes
    )


def _expert_traffic(job: PlannedJob, sparse_layers: int) -> AxisTraffic | None:
    if not sparse_layers:
        return None
    parallel, size = job.parallel, job.parallel.expert
    tokens = job.tokens_per_tensor_rank(job.mean_microbatch_tokens)
    topk = job.hf_config["num_experts_per_tok"]
    span, max_nodes = size * parallel.expert_tensor, job.hf_config.get("topk_group") or math.inf
    copies, receivers = topk, "experts"
    if parallel.dispatcher == "flex":
        num_nodes = -(-span // job.hardware.gpus_per_node)
        copies = copies_of_token(size, num_nodes, topk, max_nodes)
        receivers = "nodes (DeepEP)" if num_nodes > 1 else "ranks (DeepEP)"
    sent_tokens = copies * tokens * job.assumptions.expert_imbalance
    one_way_bytes = (
        sparse_layers
        * sent_tokens
        * job.hf_config["hidden_size"]
        * ACTIVATION_BYTES
        * (size - 1)
        / size
    )
    recomputes_experts = parallel.recompute == "selective" and "moe" in parallel.recompute_modules
    num_times = 6 if parallel.recompute == "full" or recomputes_experts else 4
    formula = (
        f"{format_count(sparse_layers, 'layer')} x {copies:.3g} {receivers} x {tokens:,.0f} "
        f"tokens x {job.hf_config['hidden_size']} x {ACTIVATION_BYTES} B x {(size - 1) / size:.2f} "
        f"x imbalance {job.assumptions.expert_imbalance}, out and back, {num_times} times"
    )
    return AxisTraffic(size, span, formula, num_times * one_way_bytes, 2 * one_way_bytes)


def _pipeline_traffic(job: PlannedJob) -> AxisTraffic:
    tokens = job.tokens_per_tensor_rank(job.mean_microbatch_tokens)
    state_bytes = tokens * job.hf_config["hidden_size"] * ACTIVATION_BYTES * job.num_model_chunks
    formula = (
        f"{tokens:,.0f} tokens x {job.hf_config['hidden_size']} x {ACTIVATION_BYTES} B x "
        f"{format_count(job.num_model_chunks, 'chunk')}, states forward and gradients backward"
    )
    return AxisTraffic(job.parallel.pipeline, job.world_size, formula, 2 * state_bytes, state_bytes)


def _data_parallel_traffic(job: PlannedJob, counts: ParameterCounts) -> AxisTraffic:
    parameter_bytes = job.parameter_bytes
    dense, expert = job.data_context_parallel_size, job.expert_data_parallel_size
    sent_values = counts.dense * (dense - 1) / dense + counts.expert * (expert - 1) / expert
    formula = (
        f"gradients reduce-scattered in fp32, parameters gathered in {parameter_bytes} B: "
        f"{counts.dense:,} dense over {dense}, {counts.expert:,} expert over {expert} ranks"
    )
    span = job.world_size // job.parallel.pipeline
    return AxisTraffic(dense, span, formula, step_bytes=sent_values * (4 + parameter_bytes))


def communication_section(job: PlannedJob, rank: int) -> QuantityTable:
    """Return the bytes that one rank of pipeline rank `rank` sends per optimizer step, by group."""
    return {
        f"{name} ({group.size} ranks)": byte_quantity(
            group.microbatch_bytes * job.num_microbatches + group.step_bytes,
            (
                f"{format_count(job.num_microbatches, 'micro-batch')} x "
                if group.microbatch_bytes
                else ""
            )
            + group.formula,
        )
        for name, group in traffic_by_axis(job, rank).items()
    }
