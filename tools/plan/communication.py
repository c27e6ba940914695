"""Bytes each rank sends, by group, and the time that takes on its slowest link.

Bytes sent by one rank: an all-gather or reduce-scatter of X bytes over n ranks sends X (n - 1) / n,
an all-to-all the share for other ranks. Ranks are laid out as in Megatron: tensor, context, data,
pipeline from the inside out; expert groups span the first three.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.reporting.wording import counted
from tools.plan.activations import VALUE
from tools.plan.job import Job
from tools.plan.parameters import Counts, RankCounts
from tools.plan.quantity import Quantity, Section


@dataclass(frozen=True)
class Group:
    """Traffic of one parallel axis on one rank of the busiest pipeline stage.

    microbatch: bytes sent for one micro-batch, forward and backward; forward: its forward part;
    step: bytes sent once per optimizer step; size: ranks; span: ranks from the first to the last of
    a group, which decides whether it fits a node.
    """

    microbatch: float
    forward: float
    step: float
    size: int
    span: int
    formula: str

    def seconds(self, job: Job, num_bytes: float) -> float:
        """Return the seconds for `num_bytes` at the assumed rates. A group wider than a node sends
        the part that leaves it through the network, concurrently with the rest through NVLink."""
        hardware, efficiency = job.hardware, job.assumptions.link_efficiency
        inside = min(1.0, hardware.gpus_per_node / self.span)
        slowest = max(inside / hardware.nvlink, (1 - inside) / hardware.network)
        return num_bytes * slowest / efficiency


def groups(job: Job, rank: int) -> dict[str, Group]:
    """Return every axis with more than one rank, on pipeline rank `rank`."""
    dense, sparse = job.layers(rank)
    axes = {
        "tensor": _tensor(job, dense + sparse),
        "context": _context(job, dense + sparse),
        "expert": _expert(job, sparse),
        "pipeline": _pipeline(job),
        "data": _data(job, RankCounts(job).of_rank(rank)),
    }
    return {name: group for name, group in axes.items() if group and group.size > 1}


def _tokens(job: Job) -> tuple[float, float]:
    """Return (whole, split) tokens of a mean micro-batch on a rank."""
    samples = job.outputs / job.minibatches / job.data
    tokens = samples * job.sample_tokens / job.num_microbatches / job.parallel.context
    return tokens, tokens / job.parallel.tensor if job.has_experts else tokens


def _tensor(job: Job, layers: int) -> Group:
    hf, size = job.hf, job.parallel.tensor
    whole, _ = _tokens(job)
    hidden, share = hf["hidden_size"], (size - 1) / size
    gathered = scattered = hidden
    if job.latent_attention:
        gathered = hidden + (hf.get("q_lora_rank") or hidden) + hf["kv_lora_rank"]
    else:
        gathered += hidden
    scattered += hidden
    forward = layers * (gathered + scattered) * whole * VALUE * share
    backward = layers * (2 * gathered + scattered) * whole * VALUE * share
    again = forward if job.parallel.recompute == "full" else 0
    return Group(
        forward + backward + again,
        forward,
        0,
        size,
        size,
        f"{counted(layers, 'layer')} x (gather {gathered} + scatter {scattered} values) x "
        f"{whole:,.0f} tokens x {VALUE} B x {share:.2f}, backward with the gathers once more",
    )


def _context(job: Job, layers: int) -> Group:
    hf, size = job.hf, job.parallel.context
    whole, _ = _tokens(job)
    heads = hf["num_attention_heads"]
    if job.latent_attention:
        values = heads * (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"])
    else:
        head = hf.get("head_dim") or hf["hidden_size"] // heads
        values = 2 * (hf.get("num_key_value_heads") or heads) * head
    values /= job.parallel.tensor
    forward = layers * values * whole * (size - 1) * VALUE
    again = 1 if job.parallel.recompute == "full" else 0
    return Group(
        (3 + again) * forward,
        forward,
        0,
        size,
        size * job.parallel.tensor,
        f"{counted(layers, 'layer')} x {values:,.0f} key and value features x {whole:,.0f} "
        f"tokens x {counted(size - 1, 'other rank')} x {VALUE} B; backward: again, and their "
        "gradients",
    )


def _expert(job: Job, sparse: int) -> Group | None:
    if not sparse:
        return None
    size = job.parallel.expert
    _, split = _tokens(job)
    routed = job.hf["num_experts_per_tok"] * split * job.assumptions.expert_imbalance
    once = sparse * routed * job.hf["hidden_size"] * VALUE * (size - 1) / size
    again = 2 if _recomputes_experts(job) else 0
    return Group(
        (4 + again) * once,
        2 * once,
        0,
        size,
        size * job.parallel.expert_tensor,
        f"{counted(sparse, 'layer')} x {job.hf['num_experts_per_tok']} experts x {split:,.0f} "
        f"tokens x {job.hf['hidden_size']} x {VALUE} B x {(size - 1) / size:.2f} x imbalance "
        f"{job.assumptions.expert_imbalance}, out and back, {4 + again} times",
    )


def _pipeline(job: Job) -> Group:
    _, split = _tokens(job)
    once = split * job.hf["hidden_size"] * VALUE * job.virtual
    return Group(
        2 * once,
        once,
        0,
        job.parallel.pipeline,
        job.world_size,
        f"{split:,.0f} tokens x {job.hf['hidden_size']} x {VALUE} B x "
        f"{counted(job.virtual, 'chunk')}, states forward and gradients backward",
    )


def _data(job: Job, counts: Counts) -> Group:
    value = job.parameter_bytes
    dense, expert = job.dense_replicas, job.expert_replicas
    moved = counts.dense * (dense - 1) / dense + counts.expert * (expert - 1) / expert
    return Group(
        0,
        0,
        moved * (4 + value),
        dense,
        job.world_size // job.parallel.pipeline,
        f"gradients reduce-scattered in fp32, parameters gathered in {value} B: {counts.dense:,} "
        f"dense over {dense}, {counts.expert:,} expert over {expert} ranks",
    )


def communication_section(job: Job, rank: int) -> Section:
    """Return the bytes that one rank of pipeline rank `rank` sends per optimizer step, by group."""
    return {
        f"{name} ({group.size} ranks)": Quantity(
            group.microbatch * job.num_microbatches + group.step,
            "B",
            (f"{counted(job.num_microbatches, 'micro-batch')} x " if group.microbatch else "")
            + group.formula,
        )
        for name, group in groups(job, rank).items()
    }


def _recomputes_experts(job: Job) -> bool:
    parallel = job.parallel
    selected = parallel.recompute == "selective" and "moe" in parallel.recompute_modules
    return parallel.recompute == "full" or selected
