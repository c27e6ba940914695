"""What happens between the phases of a step, in bytes and seconds: engines load pushed weights,
sleep and wake, the trainer saves checkpoints, `parallel.offload_between_phases` frees a trainer's
GPU while engines sample on it, and routing replay (`rl.routing_replay`) brings the trainer the
experts that the engines chose for every token.

**Offloading.** Parameters and optimizer state leave once a step and come back once, over the GPU's
link to its host and, for a disk, through the drives that a node's GPUs share. After a checkpoint,
which needs them as well, the engines get their weights a second time.

**Routing replay.**

    engines -> controller    HTTP, with zeros for dense layers (engines/server/response_checks.py)
    controller               files of TMPDIR, and the sample log (`rl.sample_log`)
    controller -> replicas   each sample once, to the first rank of its replica
    within a replica         to each other rank's host its layers of its tokens, by its first rank
                             over gloo (trainer/routing.py)
    a rank's GPU             the same

The controller and each rank are taken to send and receive at `Hardware.host_network`, the rate of
one process over TCP."""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.experts import RoutingShape, routing_shape
from megatron_r1.models.memory import ParameterCounts, checkpoint_bytes, persistent_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import drafts_with_mtp, planned_engine_layout, planned_rank_bytes
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.push.plan import EngineLayout
from megatron_r1.push.plan.predicted_sharding import PredictedSharding
from megatron_r1.reporting.formatting import format_count

OFFLOADED_MEMORY = "offloaded while engines sample"
"""The kind of host memory."""
OFFLOAD = "offload"
"""The part of a step."""
OFFLOADED_KINDS = ("parameters", "optimizer")


def offloads_state(job: PlannedJob) -> bool:
    """Return whether the job's parameters and optimizer state leave the GPU."""
    return job.verb == "rl" and job.config.parallel.offload_between_phases != "none"


def offloaded_bytes(job: PlannedJob, counts: ParameterCounts) -> int:
    """Return the bytes of a rank of one network that leave its GPU: 0 without the setting. Copies
    that the layers keep in FP8, and a reference on the device, stay."""
    if not offloads_state(job):
        return 0
    parts = persistent_bytes(job.config, counts, job.optimizer_shards, job.config.optimizer.moments)
    # What is no parameter, such as the routers' bias, stays.
    return sum(parts[kind] for kind in OFFLOADED_KINDS) - 4 * counts.buffers


def offloaded_host_bytes(job: PlannedJob, counts: ParameterCounts) -> dict[str, int]:
    """Return what of it a rank's host holds."""
    is_on_host = job.config.parallel.offload_between_phases == "host"
    return (
        {OFFLOADED_MEMORY: offloaded_bytes(job, counts)}
        if offloads_state(job) and is_on_host
        else {}
    )


def _most_offloaded_bytes(job: PlannedJob) -> int:
    """Return `offloaded_bytes` of policy and critic on the pipeline rank that has most."""
    networks = [job, job.critic] if job.critic else [job]
    counts = [RankCounts(network) for network in networks]
    return max(
        sum(offloaded_bytes(n, c.rank_counts(rank)) for n, c in zip(networks, counts, strict=True))
        for rank in range(job.parallel.pipeline)
    )


def offload_disk(job: PlannedJob) -> QuantityTable:
    """Return the room that a node's local disk needs; {} where nothing waits there."""
    if not offloads_state(job) or job.config.parallel.offload_between_phases != "disk":
        return {}
    ranks = min(job.hardware.gpus_per_node, job.world_size)
    num_bytes = _most_offloaded_bytes(job)
    formula = f"parallel.offload_folder: {ranks} ranks x {byte_quantity(num_bytes)}"
    return {OFFLOADED_MEMORY: byte_quantity(ranks * num_bytes, formula)}


def offload_time(job: PlannedJob, push_seconds: float) -> QuantityTable:
    """Return the seconds of a step; {} without the setting.

    Args:
        job: the job.
        push_seconds: those of a push, which a checkpoint repeats."""
    if not offloads_state(job):
        return {}
    num_bytes, hardware = _most_offloaded_bytes(job), job.hardware
    rate, link = hardware.host_link * job.assumptions.link_efficiency, "host_link"
    if job.config.parallel.offload_between_phases == "disk":
        disk_rate = hardware.local_disk / min(hardware.gpus_per_node, job.world_size)
        rate, link = min(rate, disk_rate), "a GPU's share of local_disk"
    interval = job.config.checkpoint.every
    transfer_seconds = 2 * num_bytes / rate
    seconds = transfer_seconds + (transfer_seconds + push_seconds) / interval
    formula = (
        f"{byte_quantity(num_bytes)} away and back / {link}, and once more with a push each "
        f"checkpoint.every={interval} steps"
    )
    return {OFFLOAD: Quantity(seconds, "s", formula)}


def weight_load_time(job: PlannedJob) -> Quantity:
    """Return the seconds in which an engine GPU takes pushed weights out of its receive buffer."""
    assumptions, weights = job.assumptions, planned_rank_bytes(job)
    layout = planned_engine_layout(job)
    tensors = _num_tensors(json.dumps(job.hf_config), layout, drafts_with_mtp(job))
    rate = job.hardware.memory_bandwidth * assumptions.bandwidth_efficiency / 2  # read and written
    route = "read and written in the GPU's memory"
    if TRANSPORTS[job.config.push.transport].memory == "host":
        rate = job.hardware.host_link * assumptions.link_efficiency
        route = "through the host's link"
    return Quantity(
        weights / rate + tensors * assumptions.tensor_load_seconds,
        "s",
        f"{byte_quantity(weights)} {route}, and {tensors:,} tensors x "
        f"{assumptions.tensor_load_seconds:g} s",
    )


@lru_cache
def _num_tensors(hf_config_json: str, layout: EngineLayout, drafts: bool) -> int:
    """Return the tensors of an engine's first GPU."""
    sharding = PredictedSharding(json.loads(hf_config_json), layout, drafts=drafts)
    return sum(1 for _ in sharding.regions_of(layout.coordinate(0)))


def sleep_wake_time(job: PlannedJob) -> Quantity:
    """Return the seconds of one sleep and one wake of all engines, which do so together."""
    assumptions = job.assumptions
    seconds = assumptions.sleep_seconds + assumptions.wake_seconds
    return Quantity(
        seconds,
        "s",
        f"{assumptions.sleep_seconds:g} s sleep_seconds + {assumptions.wake_seconds:g} s wake",
    )


def checkpoint_time(job: PlannedJob) -> Quantity:
    """Return a step's share of the seconds in which a checkpoint stops the trainer: its copy to
    the host, and the writing that steps until the next do not hide (`asynchronous`), or all."""
    settings, assumptions = job.config.checkpoint, job.assumptions
    counts = RankCounts(job)
    keeps_reference = job.computes_ref_logprobs or job.keeps_reference
    copied_bytes = max(
        checkpoint_bytes(
            job.config,
            counts.rank_counts(rank),
            job.optimizer_shards,
            with_reference=keeps_reference,
        )
        for rank in range(job.parallel.pipeline)
    )
    seconds = copied_bytes / (job.hardware.host_link * assumptions.link_efficiency)
    formula = f"{byte_quantity(copied_bytes)} of a rank to its host"
    if not settings.asynchronous:
        seconds += copied_bytes / assumptions.storage
        formula += " and to storage"
    return Quantity(
        seconds / settings.every, "s", f"({formula}) / checkpoint.every={settings.every}"
    )


def uses_routing_replay(job: PlannedJob) -> bool:
    """Return whether the job trains every token through the experts that an engine chose."""
    return job.verb == "rl" and job.config.rl.routing_replay and job.has_experts


SLICE_RATE = 0.87e9
"""Bytes a second in which a replica's first rank cuts the others' parts, while earlier ones are
sent: 66 MB of DeepSeek-V3's layers for 127 others, on one core of a CPU (`RoutingScatter`)."""


@dataclass(frozen=True)
class RoutingReplayTraffic:
    """Bytes and seconds of one rollout's routed experts, of a job that `uses_routing_replay`."""

    job: PlannedJob

    @cached_property
    def shape(self) -> RoutingShape:
        """The layers and experts of the replayed routing."""
        return routing_shape(self.job.hf_config)

    def stored_bytes(self, tokens: int) -> int:
        """Return the bytes of all samples, of `tokens` each, as the controller keeps them."""
        return self.job.num_responses * tokens * self.shape.token_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes of samples of mean length out of the controller."""
        return self.stored_bytes(self.job.sample_tokens)

    @property
    def received_bytes(self) -> int:
        """Bytes of samples of mean length into the controller: of every layer, dense ones too."""
        return self.sent_bytes * self.shape.num_layers // len(self.shape.moe_layers)

    def replica_bytes(self, tokens: int) -> int:
        """Return the bytes of a replica's samples of `tokens` each, which its first rank gets."""
        return self.stored_bytes(tokens) // self.job.data_parallel_size

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of a replica."""
        return self.job.world_size // self.job.data_parallel_size

    @property
    def forwarded_bytes(self) -> int:
        """Bytes out of a replica's first rank: all but its own part, and a byte for each token of a
        rank (`RecordedRouting.is_recorded`)."""
        rank_bytes = self.replica_bytes(self.job.sample_tokens) // self.ranks_per_replica
        marks = self.job.num_responses * self.job.sample_tokens // self.job.data_parallel_size
        marks //= self.job.parallel.tensor * self.job.parallel.context
        return (rank_bytes + marks) * (self.ranks_per_replica - 1)

    @property
    def seconds(self) -> float:
        """Seconds between rollout and training. What the engines send arrives while others
        sample."""
        rate = self.job.hardware.host_network
        return self.sent_bytes / rate + self.forwarded_bytes / min(rate, SLICE_RATE)

    @property
    def formula(self) -> str:
        """How the time follows from bytes and bandwidths, in words."""
        return (
            f"rl.routing_replay: {byte_quantity(self.sent_bytes)} out of the controller / "
            "host_network + "
            f"{byte_quantity(self.forwarded_bytes)} from a replica's first rank to "
            f"{format_count(self.ranks_per_replica - 1, 'other')}, which it cuts at "
            f"{SLICE_RATE / 1e9:g} GB/s"
        )

    def host_bytes(self, rank: int) -> int:
        """Return the most bytes on the host of a rank, the mean over the ranks of its node: the
        first of a replica's are in the first pipeline stage, one of tensor x context ranks."""
        longest_bytes = self.replica_bytes(self.job.max_sample_tokens)
        sharing_ranks = self.job.parallel.tensor * self.job.parallel.context
        sharing_ranks = min(sharing_ranks, self.job.hardware.gpus_per_node)
        node_share = longest_bytes // sharing_ranks if rank == 0 else 0
        return longest_bytes // self.ranks_per_replica + node_share

    def section(self) -> QuantityTable:
        """Return where these bytes are, and how many."""
        job, shape, rate = self.job, self.shape, self.job.hardware.host_network
        layers, experts = len(shape.moe_layers), f"{shape.topk} experts x {shape.index_bytes} B"
        mean, longest = job.sample_tokens, job.max_sample_tokens
        checkpoint, setting = job.config.checkpoint, "checkpoint.every x checkpoint.keep"
        steps = checkpoint.every * checkpoint.keep
        if job.config.rl.keep_sample_log:
            steps, setting = job.config.run.steps, "rl.keep_sample_log"
        num_layers = max(
            sum(job.is_sparse_layer[n] for c in stage for n in c.layers) for stage in job.stages
        )
        host_bytes = (
            job.tokens_per_tensor_rank(self.replica_bytes(mean) / job.parallel.context)
            * num_layers
            / layers
        )
        section = {
            "routed experts": byte_quantity(
                self.sent_bytes,
                f"rl.routing_replay: {job.num_responses:,} samples x {mean:,} tokens x "
                f"{format_count(layers, 'layer')} x {experts}, in files of the controller's TMPDIR",
            ),
            "at most": byte_quantity(
                self.stored_bytes(longest),
                f"the same with {longest:,} tokens each: room that TMPDIR needs",
            ),
            "into the controller": byte_quantity(
                self.received_bytes,
                f"from the engines, of all {shape.num_layers} layers: "
                f"{self.received_bytes / rate:.3g} s "
                "at host_network, while others sample",
            ),
            "into a replica": byte_quantity(
                self.replica_bytes(mean),
                f"those of its samples, 1 of {job.data_parallel_size}, to its first rank's host",
            ),
            "into another rank's host": byte_quantity(
                self.forwarded_bytes // max(1, self.ranks_per_replica - 1),
                f"from there its part, 1 of {self.ranks_per_replica}, and a byte a token",
            ),
            "on a trainer's GPU": byte_quantity(
                round(host_bytes),
                f"its {format_count(num_layers, 'layer')} of the tokens that it routes, all step",
            ),
        }
        if job.config.rl.sample_log:
            section["in the sample log"] = byte_quantity(
                self.sent_bytes * steps,
                f"of {format_count(steps, 'step')}, {setting}, on the run's disk",
            )
        return section


def routing_replay_time(job: PlannedJob) -> QuantityTable:
    """Return the seconds that a step waits for routed experts; {} without replay."""
    if not uses_routing_replay(job):
        return {}
    traffic = RoutingReplayTraffic(job)
    return {ROUTED_EXPERTS: Quantity(traffic.seconds, "s", traffic.formula)}


ROUTED_EXPERTS = "routed experts"
"""The part of a step, and the kind of host memory."""


def routing_replay_host_bytes(job: PlannedJob, rank: int) -> dict[str, int]:
    """Return the bytes of a pipeline rank's host while samples are loaded, all of the longest."""
    return (
        {ROUTED_EXPERTS: RoutingReplayTraffic(job).host_bytes(rank)}
        if uses_routing_replay(job)
        else {}
    )
