"""Memory of every pipeline rank, by kind: while it trains, and while it scores the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tools.plan.activations import Layer, in_flight, layer_activations
from tools.plan.job import BYTES, Job
from tools.plan.loss_head import head_bytes
from tools.plan.parameters import Counts, RankCounts
from tools.plan.push import landing_bytes
from tools.plan.quantity import Quantity, Section


def adam_bytes(job: Job) -> int:
    """Of one parameter's optimizer state: two moments and, for a bf16 one, an fp32 master copy."""
    master = 4 if job.parameter_bytes == 2 else 0
    return master + 2 * BYTES[job.config.optimizer.moments]


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank's bytes on its GPU, by kind, and on its host."""

    rank: int
    counts: Counts
    training: dict[str, int]
    scoring: dict[str, int]
    host: dict[str, int]

    @property
    def persistent(self) -> int:
        """Parameters, gradients, optimizer state: there from the first step to the last."""
        return sum(self.training.get(kind, 0) for kind in (*PERSISTENT, CRITIC))

    @property
    def peak(self) -> int:
        return max(sum(self.training.values()), sum(self.scoring.values()))


PERSISTENT = ("parameters", "gradients", "optimizer")
CRITIC = "critic"
"""The same three of PPO's critic, which lie beside the policy's."""
LANDING = "landing memory"
"""Of the engine rank on the same GPU, which does not give it back while it sleeps."""


def rank_memory(job: Job) -> list[RankMemory]:
    """Of each pipeline rank; ranks that differ along other axes only need the same."""
    counts = RankCounts(job)
    layers = {sparse: layer_activations(job, sparse) for sparse in (False, job.has_experts)}
    made = [_of_rank(job, counts, layers, rank) for rank in range(job.parallel.pipeline)]
    if job.critic:
        critics = RankCounts(job.critic)
        made = [_with_critic(job.critic, memory, critics.of_rank(memory.rank)) for memory in made]
    return made


def persistent_bytes(job: Job, counts: Counts) -> dict[str, int]:
    """Parameters and gradients lie in DDP's buffers, which pad each parameter to 64 values and the
    whole to a multiple of 128 and of its replicas; optimizer state is shared out among those."""
    value = job.parameter_bytes
    dense = _padded(counts.dense_padded, job.dense_replicas)
    expert = _padded(counts.expert_padded, job.expert_replicas)
    state = adam_bytes(job)
    shared = dense / job.dense_replicas + expert / job.expert_replicas
    return {
        "parameters": (dense + expert + counts.frozen) * value + 4 * counts.buffers,
        "gradients": (dense + expert) * 4,
        "optimizer": round(shared * state),
    }


def _of_rank(job: Job, ranks: RankCounts, layers: dict[bool, Layer], rank: int) -> RankMemory:
    parallel, counts = job.parallel, ranks.of_rank(rank)
    persistent = persistent_bytes(job, counts)
    kept, working = _activations(job, rank, layers)
    # Without a graph nothing is kept: one layer's tensors, at most.
    forward_only = max(x.everything + x.dispatch for x in _held(job, rank, layers))
    last = any(chunk.head for chunk in job.stages[rank])
    head = head_bytes(job)[0] if last else 0
    reference = counts.parameters * job.parameter_bytes + 4 * counts.buffers
    reserved = round(job.assumptions.reserved)
    on_host = round(persistent["optimizer"] * parallel.optimizer_offload)
    persistent["optimizer"] -= on_host
    host = {"reference": reference if job.has_reference else 0, "optimizer": on_host}
    if job.config.checkpoint.asynchronous:
        host["checkpoint being written"] = (
            counts.parameters * job.parameter_bytes + persistent["optimizer"] + on_host
        )
    training = {
        **persistent,
        "fp8 copies": _fp8_copies(job, counts),
        "activations": kept,
        "layer in work": working,
        "loss head": head,
        "reserved": reserved,
    }
    scoring = {
        **persistent,
        "fp8 copies": _fp8_copies(job, counts),
        "reference": host["reference"],
        "layer in work": forward_only,
        "loss head": head,
        "reserved": reserved,
    }
    if landing := 0 if job.rollout_gpus else landing_bytes(job, "GPU"):
        training[LANDING] = scoring[LANDING] = landing
    if parallel.reference_offload == "device":
        training["reference"] = host.pop("reference")
    if job.verb != "rl":
        scoring = {}
    return RankMemory(rank, counts, training, scoring, host)


def _with_critic(critic: Job, memory: RankMemory, counts: Counts) -> RankMemory:
    """With the other model's persistent state. The two compute in turn, and a score head needs less
    than a language head, so the rest stays as it is."""
    persistent = persistent_bytes(critic, counts)
    on_host = round(persistent["optimizer"] * critic.parallel.optimizer_offload)
    num_bytes = sum(persistent.values()) - on_host + _fp8_copies(critic, counts)
    host = {**memory.host, "critic's optimizer": on_host}
    if critic.config.checkpoint.asynchronous:
        host["checkpoint being written"] += (
            counts.parameters * critic.parameter_bytes + persistent["optimizer"]
        )
    training, scoring = (
        {**kinds, CRITIC: num_bytes} for kinds in (memory.training, memory.scoring)
    )
    return replace(memory, training=training, scoring=scoring, host=host)


def _activations(job: Job, rank: int, layers: dict[bool, Layer]) -> tuple[int, int]:
    """(kept for the micro-batches in flight, needed beside by the layer in work)."""
    parallel, stages = job.parallel, job.stages[rank]
    flights = microbatches_held(job, rank)
    kept_by = {sparse: layer.kept(parallel) for sparse, layer in layers.items()}
    # A chunk's output stays when it has been sent on (deallocate_pipeline_outputs is off).
    kept = sum(
        count * (layers[False].input + sum(kept_by[job.sparse[n]] for n in chunk.layers))
        for chunk, count in zip(stages, flights, strict=True)
    )
    return kept, max(layer.working(parallel) for layer in _held(job, rank, layers))


def microbatches_held(job: Job, rank: int) -> list[int]:
    """Whose activations each chunk of a pipeline rank holds at the peak; empty ones have none."""
    held = in_flight(rank, job.parallel.pipeline, job.virtual, job.slots)
    return [min(count, job.num_microbatches) for count in held]


def _held(job: Job, rank: int, layers: dict[bool, Layer]) -> list[Layer]:
    """One of each kind of layer on a pipeline rank."""
    held = [layers[sparse] for sparse, count in enumerate(job.layers(rank)) if count]
    return held or [Layer(0, 0, {}, 0)]


def _fp8_copies(job: Job, counts: Counts) -> int:
    """Quantized weights of the linear layers, as stored and transposed, one byte each."""
    return 2 * counts.trained if job.fp8 else 0


def _padded(count: int, replicas: int) -> int:
    multiple = math.lcm(replicas, 128)
    return -(-count // multiple) * multiple


def memory_section(job: Job, rank: RankMemory) -> Section:
    """The kinds of one pipeline rank, each with its formula."""
    parallel, value = job.parallel, job.parameter_bytes
    c = rank.counts
    dense, expert = f"{c.dense:,} dense", f"{c.expert:,} expert"
    flights = microbatches_held(job, rank.rank)
    state = adam_bytes(job)
    left = 1 - parallel.optimizer_offload
    part = f" x {left:.2g}, the rest on the host" if parallel.optimizer_offload else ""
    formulas = {
        "parameters": f"({dense} + {expert} + {c.frozen:,} frozen) x {value} B",
        "gradients": f"({dense} + {expert}) x 4 B (fp32)",
        "optimizer": f"{state} B x (dense / {job.dense_replicas} + expert / {job.expert_replicas} "
        f"replicas){part}",
        "fp8 copies": "two fp8 copies of each linear weight" if rank.training["fp8 copies"] else "",
        "activations": f"micro-batches in flight: {' + '.join(map(str, flights))}, x "
        f"{job.microbatch_tokens:,} tokens / context {parallel.context}, recompute "
        f"{parallel.recompute}",
        "layer in work": "what recomputation brings back in one layer, and its token exchange",
        "loss head": head_bytes(job)[1] if rank.training["loss head"] else "not on this rank",
        "reserved": "assumed: CUDA context, NCCL, fragmentation",
        "reference": f"parameters x {value} B",
        LANDING: "weights on their way into the engine on this GPU, kept between pushes",
        CRITIC: "parameters, gradients and optimizer of a score model, as above",
    }
    section = {
        kind: Quantity(num_bytes, "B", formulas[kind]) for kind, num_bytes in rank.training.items()
    }
    section["peak, training"] = Quantity(sum(rank.training.values()), "B", "sum of the above")
    if rank.scoring:
        section["peak, scoring"] = Quantity(
            sum(rank.scoring.values()),
            "B",
            "persistent state, the reference beside the policy, one layer's forward pass",
        )
    return section
