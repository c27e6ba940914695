"""Memory of the trainer's ranks on GPU and host, by kind: of every pipeline rank, while it trains
and while it computes log-probabilities."""

from dataclasses import dataclass, replace

from megatron_r1.models.memory import (
    LayerActivations,
    ParameterCounts,
    checkpoint_bytes,
    head_bytes,
    layer_activations,
    parameter_bytes,
    persistent_bytes,
    reference_bytes,
)
from megatron_r1.plan.communicators import (
    COMMUNICATORS,
    communicator_bytes,
    communicator_formula,
)
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.engine_buffers import DEEPEP_BUFFERS, deepep_buffer_bytes
from megatron_r1.plan.exchange_overlap_time import working_bytes
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.offload import offloaded_bytes, offloaded_host_bytes
from megatron_r1.plan.push_costs import receive_buffer_bytes
from megatron_r1.plan.quantity import QuantityTable, byte_quantity
from megatron_r1.plan.sample_traffic import routing_replay_host_bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank on its GPU and on its host, by kind."""

    rank: int
    """Its pipeline rank"""
    counts: ParameterCounts
    """Its parameters by kind"""
    training: dict[str, int]
    """Bytes on the GPU by kind while it trains"""
    logprobs: dict[str, int]
    """Bytes on the GPU by kind while it computes log-probabilities alone"""
    host: dict[str, int]
    """Bytes on its host by kind"""
    freed_bytes: int
    """Bytes of gradients, if they are freed while engines compute on the same GPU, and of what
    `parallel.offload_between_phases` moves elsewhere meanwhile."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of models and optimizers that stay while engines compute."""
        return sum(self.training.get(kind, 0) for kind in RESIDENT) - self.freed_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes of the larger of training and the pass of log-probabilities."""
        return max(sum(self.training.values()), sum(self.logprobs.values()))


PERSISTENT_KINDS = ("parameters", "gradients", "optimizer")
CRITIC = "critic"
"""The three kinds of PPO's critic, in addition to the policy's."""
RESIDENT = (*PERSISTENT_KINDS, "fp8 copies", "reference", CRITIC)
"""Kinds that stay on the GPU between updates; the reference only where it is kept there."""
RECEIVE_BUFFER = "receive buffer"
"""The receive buffer of the engine rank on the same GPU, which it keeps while it sleeps."""


def rank_memory(job: PlannedJob) -> list[RankMemory]:
    """Return the memory of each pipeline rank; ranks that differ in other axes only are equal."""
    counts = RankCounts(job)
    settings = (job.hf_config, job.config, job.microbatch_tokens)
    imbalance = job.assumptions.expert_imbalance
    layers = {
        sparse: layer_activations(*settings, sparse=sparse, imbalance=imbalance)
        for sparse in (False, job.has_experts)
    }
    ranks = [_rank_memory(job, counts, layers, rank) for rank in range(job.parallel.pipeline)]
    if job.critic:
        critics = RankCounts(job.critic)
        ranks = [_with_critic(job.critic, rank, critics.rank_counts(rank.rank)) for rank in ranks]
    return ranks


def _persistent_bytes(job: PlannedJob, counts: ParameterCounts) -> dict[str, int]:
    return persistent_bytes(job.config, counts, job.optimizer_shards, job.config.optimizer.moments)


def _rank_memory(
    job: PlannedJob, rank_counts: RankCounts, layers: dict[bool, LayerActivations], rank: int
) -> RankMemory:
    parallel, counts = job.parallel, rank_counts.rank_counts(rank)
    persistent = _persistent_bytes(job, counts)
    kept_bytes, layer_bytes = _activation_bytes(job, rank, layers)
    # Without a graph nothing is kept: one layer's tensors at most.
    forward_bytes = max(x.total + x.dispatch for x in _kinds_of_layers(job, rank, layers))
    is_last_stage = any(chunk.head for chunk in job.pipeline_stages[rank])
    head_bytes = _head_bytes(job)[0] if is_last_stage else 0
    reference_size = reference_bytes(job.config, counts)
    optimizer_on_cpu = round(persistent["optimizer"] * parallel.optimizer_offload)
    persistent["optimizer"] -= optimizer_on_cpu
    keeps_reference = job.computes_ref_logprobs or job.keeps_reference
    host = {"reference": reference_size if keeps_reference else 0, "optimizer": optimizer_on_cpu}
    host |= routing_replay_host_bytes(job, rank) | offloaded_host_bytes(job, counts)
    if job.config.checkpoint.asynchronous:
        host["checkpoint being written"] = checkpoint_bytes(
            job.config, counts, job.optimizer_shards, with_reference=keeps_reference
        )
    persistent_kinds = {**persistent, "fp8 copies": _fp8_copies(job, counts)}
    counted = communicator_bytes(job)
    reserved = max(0, round(job.assumptions.reserved) - counted)
    ends = {"loss head": head_bytes, COMMUNICATORS: counted, "reserved": reserved}
    training = {**persistent_kinds, "activations": kept_bytes, "layer in work": layer_bytes, **ends}
    logprobs_reference = reference_size if job.computes_ref_logprobs else 0
    logprobs = {
        **persistent_kinds,
        "reference": logprobs_reference,
        "layer in work": forward_bytes,
        **ends,
    }
    if buffer := 0 if job.rollout_gpus else receive_buffer_bytes(job, "GPU"):
        training[RECEIVE_BUFFER] = logprobs[RECEIVE_BUFFER] = buffer
    if buffers := 0 if job.rollout_gpus else deepep_buffer_bytes(job):
        training[DEEPEP_BUFFERS] = logprobs[DEEPEP_BUFFERS] = buffers
    if parallel.reference_offload == "device":
        training["reference"] = logprobs["reference"] = host.pop("reference")
    if job.verb != "rl":
        logprobs = {}
    freed_bytes = 0
    if job.config.rollout.colocated and logprobs:  # until the first update
        freed_bytes = logprobs.pop("gradients")
    return RankMemory(
        rank, counts, training, logprobs, host, freed_bytes + offloaded_bytes(job, counts)
    )


def _with_critic(critic: PlannedJob, memory: RankMemory, counts: ParameterCounts) -> RankMemory:
    """Add the critic's persistent state. The two models compute in turn, and a score head needs
    less than a language head, so the other kinds are unchanged."""
    persistent = _persistent_bytes(critic, counts)
    optimizer_on_cpu = round(persistent["optimizer"] * critic.parallel.optimizer_offload)
    num_bytes = sum(persistent.values()) - optimizer_on_cpu + _fp8_copies(critic, counts)
    host = {**memory.host, "critic's optimizer": optimizer_on_cpu}
    for kind, kind_bytes in offloaded_host_bytes(critic, counts).items():
        host[kind] += kind_bytes
    if critic.config.checkpoint.asynchronous:
        host["checkpoint being written"] += checkpoint_bytes(
            critic.config, counts, critic.optimizer_shards, with_reference=False
        )
    freed_bytes = persistent["gradients"] if critic.config.rollout.colocated else 0
    training = {**memory.training, CRITIC: num_bytes}
    logprobs = {**memory.logprobs, CRITIC: num_bytes - freed_bytes}
    freed_bytes += memory.freed_bytes + offloaded_bytes(critic, counts)
    return replace(memory, training=training, logprobs=logprobs, host=host, freed_bytes=freed_bytes)


def _activation_bytes(
    job: PlannedJob, rank: int, layers: dict[bool, LayerActivations]
) -> tuple[int, int]:
    """Return (bytes kept for the micro-batches in flight, bytes the layer in work adds)."""
    parallel, stages = job.parallel, job.pipeline_stages[rank]
    microbatches_per_chunk = _microbatches_held(job, rank)
    saved_bytes = {sparse: layer.saved_bytes(parallel) for sparse, layer in layers.items()}
    # A chunk's output stays after it was sent (deallocate_pipeline_outputs is off).
    kept_bytes = sum(
        count
        * (layers[False].input + sum(saved_bytes[job.is_sparse_layer[n]] for n in chunk.layers))
        for chunk, count in zip(stages, microbatches_per_chunk, strict=True)
    )
    kinds = _kinds_of_layers(job, rank, layers)
    return kept_bytes, max(working_bytes(layer, parallel) for layer in kinds)


def _microbatches_held(job: PlannedJob, rank: int) -> list[int]:
    """Return `microbatches_in_flight` of a pipeline rank, without the empty micro-batches."""
    microbatches_per_chunk = microbatches_in_flight(
        rank, job.parallel.pipeline, job.num_model_chunks, job.schedule_slots
    )
    return [min(count, job.num_microbatches) for count in microbatches_per_chunk]


def _kinds_of_layers(
    job: PlannedJob, rank: int, layers: dict[bool, LayerActivations]
) -> list[LayerActivations]:
    """Return one of each kind of layer on a pipeline rank."""
    kinds = [
        layers[bool(sparse)] for sparse, count in enumerate(job.num_layers_of_kinds(rank)) if count
    ]
    return kinds or [LayerActivations(0, 0, {}, 0)]


def _fp8_copies(job: PlannedJob, counts: ParameterCounts) -> int:
    """Return bytes of the linear layers' fp8 weights: plain and transposed, one byte each."""
    linear = counts.trained if job.adapters is None else counts.frozen
    return 0 if job.config.fp8.recipe == "none" else 2 * linear


def _head_bytes(job: PlannedJob) -> tuple[int, str]:
    """Return `head_bytes` of a last-stage rank's largest micro-batch."""
    shape, tokens = job.weight_table.head[0].sources[0].shape, job.microbatch_tokens
    return head_bytes(shape, job.config, tokens, on_gpu=True, has_experts=job.has_experts)


def microbatches_in_flight(rank: int, pipeline: int, virtual: int, microbatches: int) -> list[int]:
    """Return how many micro-batches' activations each chunk of a pipeline rank holds at the peak.

    In the 1F1B schedule these are the forward passes of the warm-up and one more (schedules.py,
    get_pp_rank_microbatches); with virtual stages they rotate over chunks, `pipeline` at a time.

    Args:
        rank: the rank's place in the pipeline, from 0.
        pipeline: pipeline-parallel ranks.
        virtual: chunks of each rank.
        microbatches: micro-batches of an optimizer step on this replica."""
    if virtual == 1:
        return [min(microbatches, pipeline - rank)]
    count = min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1, virtual * microbatches)
    microbatches_per_chunk = [0] * virtual
    for start in range(0, microbatches, pipeline):
        round_size = min(pipeline, microbatches - start)
        for chunk in range(virtual):
            microbatches_per_chunk[chunk] += min(round_size, count - sum(microbatches_per_chunk))
    return microbatches_per_chunk


def memory_section(job: PlannedJob, rank: RankMemory) -> QuantityTable:
    """Return the kinds of one pipeline rank's memory, each with its formula."""
    parallel, value = job.parallel, job.parameter_bytes
    counts = rank.counts
    dense, expert = f"{counts.dense:,} dense", f"{counts.expert:,} expert"
    microbatches_per_chunk = _microbatches_held(job, rank.rank)
    state = parameter_bytes(job.config.model.dtype, job.config.optimizer.moments).optimizer
    gpu_fraction = 1 - parallel.optimizer_offload
    part = f" x {gpu_fraction:.2g}, the rest on the host" if parallel.optimizer_offload else ""
    formulas = {
        "parameters": f"({dense} + {expert} + {counts.frozen:,} frozen) x {value} B",
        "gradients": f"({dense} + {expert}) x 4 B (fp32)",
        "optimizer": f"{state} B x (dense / {job.data_context_parallel_size} + expert / "
        f"{job.expert_data_parallel_size} replicas){part}",
        "fp8 copies": "two fp8 copies of each linear weight"
        if rank.training["fp8 copies"]
        else "fp8.recipe: none",
        "activations": f"micro-batches in flight: {' + '.join(map(str, microbatches_per_chunk))}, "
        f"x {job.microbatch_tokens:,} tokens / context {parallel.context}, recompute "
        f"{parallel.recompute}",
        "layer in work": "what recomputation brings back in one layer, and its token exchange",
        "loss head": _head_bytes(job)[1] if rank.training["loss head"] else "not on this rank",
        COMMUNICATORS: communicator_formula(job),
        "reserved": f"assumed: {byte_quantity(job.assumptions.reserved)} with communicators, "
        "CUDA context, fragmentation",
        "reference": f"parameters x {value} B",
        RECEIVE_BUFFER: "weights on their way into the engine on this GPU, kept between pushes",
        DEEPEP_BUFFERS: "of the engine on this GPU, which it keeps while it sleeps",
        CRITIC: "parameters, gradients and optimizer of a score model, as above",
    }
    section = {
        kind: byte_quantity(num_bytes, formulas[kind]) for kind, num_bytes in rank.training.items()
    }
    section["peak, training"] = byte_quantity(sum(rank.training.values()), "sum of the above")
    if rank.logprobs:
        section["peak, logprobs"] = byte_quantity(
            sum(rank.logprobs.values()),
            f"persistent state{', without gradients' if rank.freed_bytes else ''}, the reference "
            "next to the policy, one layer's forward pass",
        )
    return section
