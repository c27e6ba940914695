"""A rollout's samples on their way from the engines to the trainer, most of all the experts that
the engines chose for every token (`rl.routing_replay`).

    engines -> controller    HTTP, with zeros for dense layers (engines/server/responses.py)
    controller               files of TMPDIR, and the sample log (`rl.sample_log`)
    controller -> replicas   each sample once, to the first rank of its replica
    within a replica         to each other rank's host its layers of its tokens, by its first rank
                             over gloo (trainer/routing.py)
    a rank's GPU             the same

The controller and each rank are taken to send and receive at `Hardware.host_network`, the rate of
one process over TCP."""

from dataclasses import dataclass
from functools import cached_property

from megatron_r1.models.routing_shape import RoutingShape, routing_shape
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.reporting.formatting import format_count

ID_BYTES = LOGPROB_BYTES = 4
"""Bytes of a token's id and of its log-probability in trainer/training_sample.py."""
ROUTED_EXPERTS = "routed experts"
"""The part of a step, and the kind of host memory."""
SLICE_RATE = 0.87e9
"""Bytes a second in which a replica's first rank cuts the others' parts, while earlier ones are
sent: 66 MB of DeepSeek-V3's layers for 127 others, on one core of a CPU (`RoutingScatter`)."""


def samples_section(job: PlannedJob) -> QuantityTable:
    """Return bytes of a rollout's samples: token ids, log-probabilities, routing."""
    prompt, response = job.assumptions.prompt_tokens, job.response_tokens
    section = {
        "ids, log-probabilities": byte_quantity(
            job.num_responses * ((prompt + response) * ID_BYTES + response * LOGPROB_BYTES),
            f"{job.num_responses:,} samples x ({prompt + response:,} ids x {ID_BYTES} B + "
            f"{response:,} log-probabilities x {LOGPROB_BYTES} B)"
            + ("; rl.importance_cap reads these" if job.config.rl.importance_cap else ""),
        )
    }
    if uses_routing_replay(job):
        section |= RoutingReplayTraffic(job).section()
    elif job.has_experts:
        shape = routing_shape(job.hf_config)
        section["routed experts"] = byte_quantity(
            job.num_responses * (prompt + response) * shape.token_bytes,
            f"with rl.routing_replay: {job.num_responses:,} samples x {prompt + response:,} tokens "
            f"x {format_count(len(shape.moe_layers), 'layer')} x {shape.topk} experts x "
            f"{shape.index_bytes} B",
        )
    return section


def uses_routing_replay(job: PlannedJob) -> bool:
    """Return whether the job trains every token through the experts that an engine chose."""
    return job.verb == "rl" and job.config.rl.routing_replay and job.has_experts


def routing_replay_time(job: PlannedJob) -> QuantityTable:
    """Return the seconds that a step waits for routed experts; {} without replay."""
    if not uses_routing_replay(job):
        return {}
    traffic = RoutingReplayTraffic(job)
    return {ROUTED_EXPERTS: Quantity(traffic.seconds, "s", traffic.formula)}


def routing_replay_host_bytes(job: PlannedJob, rank: int) -> dict[str, int]:
    """Return the bytes of a pipeline rank's host while samples are loaded, all of the longest."""
    return (
        {ROUTED_EXPERTS: RoutingReplayTraffic(job).host_bytes(rank)}
        if uses_routing_replay(job)
        else {}
    )


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
        return self.stored_bytes(self.job.mean_sample_tokens)

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
        rank_bytes = self.replica_bytes(self.job.mean_sample_tokens) // self.ranks_per_replica
        marks = self.job.num_responses * self.job.mean_sample_tokens // self.job.data_parallel_size
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
        """Return the most bytes on the host of a rank, the mean over the ranks of its node.

        A replica's first rank is in the first pipeline stage, one of tensor x context ranks."""
        longest_bytes = self.replica_bytes(self.job.max_sample_tokens)
        sharing_ranks = self.job.parallel.tensor * self.job.parallel.context
        sharing_ranks = min(sharing_ranks, self.job.hardware.gpus_per_node)
        node_share = longest_bytes // sharing_ranks if rank == 0 else 0
        return longest_bytes // self.ranks_per_replica + node_share

    def section(self) -> QuantityTable:
        """Return where these bytes are, and how many."""
        job, shape, rate = self.job, self.shape, self.job.hardware.host_network
        layers, experts = len(shape.moe_layers), f"{shape.topk} experts x {shape.index_bytes} B"
        mean, longest = job.mean_sample_tokens, job.max_sample_tokens
        checkpoint, setting = job.config.checkpoint, "checkpoint.every x checkpoint.keep"
        steps = checkpoint.every * checkpoint.keep
        controller_seconds = Quantity(self.received_bytes / rate, "s")
        controller_seconds = controller_seconds.with_spread(job.assumptions.time_spread)
        if job.config.rl.keep_sample_log:
            steps, setting = job.config.run.steps, "rl.keep_sample_log"
        num_layers = max(
            sum(job.is_sparse_layer[n] for c in stage for n in c.layers)
            for stage in job.pipeline_stages
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
                f"{controller_seconds.limits} at host_network, while others sample",
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
