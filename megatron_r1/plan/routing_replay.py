"""What routing replay (`rl.routing_replay`) moves and keeps in a step: the experts that the engines
chose for every token.

    engines -> controller    HTTP, with zeros for dense layers (engines/server/replies.py)
    controller               files of TMPDIR, and the sample log (`rl.sample_log`)
    controller -> replicas   each sample once, to the first rank of its replica
    within a replica         to each other rank's host its layers of its tokens, by its first rank
                             over gloo (trainer/routing.py)
    a rank's GPU             the same

The controller and each rank are taken to send and receive at `Hardware.host_network`, the rate of
one process over TCP."""

from dataclasses import dataclass
from functools import cached_property

from megatron_r1.models.experts import RoutingShape, routing_shape
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, Section, in_bytes
from megatron_r1.reporting.wording import counted


def replays(job: PlannedJob) -> bool:
    """Return whether the job trains every token through the experts that an engine chose."""
    return job.verb == "rl" and job.config.rl.routing_replay and job.has_experts


CUT_RATE = 0.87e9
"""Bytes a second in which a replica's first rank cuts the others' parts, while earlier ones are
sent: 66 MB of DeepSeek-V3's layers for 127 others, on one core of a CPU (`RoutingScatter`)."""


@dataclass(frozen=True)
class ReplayTraffic:
    """Bytes and seconds of one rollout's routed experts, of a job that `replays`."""

    job: PlannedJob

    @cached_property
    def shape(self) -> RoutingShape:
        """The layers and experts of the replayed routing."""
        return routing_shape(self.job.hf)

    def kept(self, tokens: int) -> int:
        """Return the bytes of all samples, of `tokens` each, as the controller keeps them."""
        return self.job.num_responses * tokens * self.shape.token_bytes

    @property
    def sent(self) -> int:
        """Bytes of samples of mean length out of the controller."""
        return self.kept(self.job.sample_tokens)

    @property
    def received(self) -> int:
        """Bytes of samples of mean length into the controller: of every layer, dense ones too."""
        return self.sent * self.shape.num_layers // len(self.shape.moe_layers)

    def of_replica(self, tokens: int) -> int:
        """Return the bytes of a replica's samples of `tokens` each, which its first rank gets."""
        return self.kept(tokens) // self.job.data_parallel

    @property
    def members(self) -> int:
        """Ranks of a replica."""
        return self.job.world_size // self.job.data_parallel

    @property
    def passed_on(self) -> int:
        """Bytes out of a replica's first rank: all but its own part, and a byte for each token of a
        rank (`RecordedRouting.known`)."""
        own = self.of_replica(self.job.sample_tokens) // self.members
        marks = self.job.num_responses * self.job.sample_tokens // self.job.data_parallel
        marks //= self.job.parallel.tensor * self.job.parallel.context
        return (own + marks) * (self.members - 1)

    @property
    def seconds(self) -> float:
        """Seconds between rollout and training. What the engines send arrives while others
        sample."""
        rate = self.job.hardware.host_network
        return self.sent / rate + self.passed_on / min(rate, CUT_RATE)

    @property
    def formula(self) -> str:
        """How the time follows from bytes and bandwidths, in words."""
        return (
            f"rl.routing_replay: {in_bytes(self.sent)} out of the controller / host_network + "
            f"{in_bytes(self.passed_on)} from a replica's first rank to "
            f"{counted(self.members - 1, 'other')}, which it cuts at {CUT_RATE / 1e9:g} GB/s"
        )

    def on_host(self, rank: int) -> int:
        """Return the most bytes on the host of a rank, the mean over the ranks of its node: the
        first of a replica's are in the first pipeline stage, one of tensor x context ranks."""
        longest = self.of_replica(self.job.longest_sample)
        beside = self.job.parallel.tensor * self.job.parallel.context
        beside = min(beside, self.job.hardware.gpus_per_node)
        return longest // self.members + (longest // beside if rank == 0 else 0)

    def section(self) -> Section:
        """Return where these bytes are, and how many."""
        job, shape, rate = self.job, self.shape, self.job.hardware.host_network
        layers, chosen = len(shape.moe_layers), f"{shape.topk} experts x {shape.index_bytes} B"
        mean, longest = job.sample_tokens, job.longest_sample
        checkpoint, kept = job.config.checkpoint, "checkpoint.every x checkpoint.keep"
        steps = checkpoint.every * checkpoint.keep
        if job.config.rl.keep_sample_log:
            steps, kept = job.config.run.steps, "rl.keep_sample_log"
        held = max(sum(job.sparse[n] for c in stage for n in c.layers) for stage in job.stages)
        own = job.split(self.of_replica(mean) / job.parallel.context) * held / layers
        section = {
            "routed experts": in_bytes(
                self.sent,
                f"rl.routing_replay: {job.num_responses:,} samples x {mean:,} tokens x "
                f"{counted(layers, 'layer')} x {chosen}, in files of the controller's TMPDIR",
            ),
            "at most": in_bytes(
                self.kept(longest), f"the same with {longest:,} tokens each: room that TMPDIR needs"
            ),
            "into the controller": in_bytes(
                self.received,
                f"from the engines, of all {shape.num_layers} layers: {self.received / rate:.3g} s "
                "at host_network, while others sample",
            ),
            "into a replica": in_bytes(
                self.of_replica(mean),
                f"those of its samples, 1 of {job.data_parallel}, to its first rank's host",
            ),
            "into another rank's host": in_bytes(
                self.passed_on // max(1, self.members - 1),
                f"from there its part, 1 of {self.members}, and a byte a token",
            ),
            "on a trainer's GPU": in_bytes(
                round(own), f"its {counted(held, 'layer')} of the tokens that it routes, all step"
            ),
        }
        if job.config.rl.sample_log:
            section["in the sample log"] = in_bytes(
                self.sent * steps,
                f"of {counted(steps, 'step')}, {kept}, on the run's disk",
            )
        return section


def replay_time(job: PlannedJob) -> Section:
    """Return the seconds that a step waits for routed experts; {} without replay."""
    if not replays(job):
        return {}
    traffic = ReplayTraffic(job)
    return {ROUTED: Quantity(traffic.seconds, "s", traffic.formula)}


ROUTED = "routed experts"
"""The part of a step, and the kind of host memory."""


def replay_host_bytes(job: PlannedJob, rank: int) -> dict[str, int]:
    """Return the bytes of a pipeline rank's host while samples are loaded, all of the longest."""
    return {ROUTED: ReplayTraffic(job).on_host(rank)} if replays(job) else {}
