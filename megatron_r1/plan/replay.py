"""What routing replay (`rl.routing_replay`) moves and keeps in a step: the experts that the engines
chose for every token.

    engines -> controller    HTTP, with zeros for dense layers (engines/server/replies.py)
    controller               files of TMPDIR, and the sample log (`rl.sample_log`)
    controller -> replicas   each sample once, to the first rank of its replica
    within a replica         all that it was sent, to every rank's host, by gloo's broadcast
                             (trainer/distributed.py, `Replica`)
    a rank's GPU             its layers of its tokens (trainer/packed.py)

The controller and each rank are taken to send and receive at `Hardware.host_network`, the rate of
one process over TCP."""

from dataclasses import dataclass
from functools import cached_property

from megatron_r1.models.routing_shape import RoutingShape, routing_shape
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, Section, in_bytes
from megatron_r1.reporting.wording import counted


def replays(job: PlannedJob) -> bool:
    """Return whether the job trains every token through the experts that an engine chose."""
    return job.verb == "rl" and job.config.rl.routing_replay and job.has_experts


@dataclass(frozen=True)
class ReplayTraffic:
    """Bytes and seconds of one rollout's routed experts, of a job that `replays`."""

    job: PlannedJob

    @cached_property
    def shape(self) -> RoutingShape:
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
        """Return the bytes that each rank's host is sent, with samples of `tokens` each."""
        return self.kept(tokens) // self.job.data

    @property
    def hops(self) -> int:
        """Levels of gloo's tree over the ranks of a replica."""
        return (self.job.world_size // self.job.data - 1).bit_length()

    @property
    def seconds(self) -> float:
        """Seconds between rollout and training. What the engines send arrives while others
        sample."""
        passed_on = self.hops * self.of_replica(self.job.sample_tokens)
        return (self.sent + passed_on) / self.job.hardware.host_network

    @property
    def formula(self) -> str:
        size = in_bytes(self.of_replica(self.job.sample_tokens))
        return (
            f"rl.routing_replay: ({in_bytes(self.sent)} out of the controller + "
            f"{counted(self.hops, 'level')} of gloo's tree x {size} of a replica) / host_network"
        )

    def section(self) -> Section:
        """Return where these bytes are, and how many."""
        job, shape, rate = self.job, self.shape, self.job.hardware.host_network
        layers, chosen = len(shape.moe_layers), f"{shape.topk} experts x {shape.index_bytes} B"
        mean, longest = job.sample_tokens, job.longest_sample
        steps = job.config.checkpoint.every * job.config.checkpoint.keep
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
            "into a trainer's host": in_bytes(
                self.of_replica(mean),
                f"those of its replica, 1 of {job.data}, to each rank, while samples are loaded",
            ),
            "on a trainer's GPU": in_bytes(
                round(own), f"its {counted(held, 'layer')} of the tokens that it routes, all step"
            ),
        }
        if job.config.rl.sample_log:
            section["in the sample log"] = in_bytes(
                self.sent * steps,
                f"of {counted(steps, 'step')}, checkpoint.every x checkpoint.keep, on the run's "
                "disk",
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


def replay_host_bytes(job: PlannedJob) -> dict[str, int]:
    """Return the bytes of a rank's host while samples are loaded, all of the longest."""
    return {ROUTED: ReplayTraffic(job).of_replica(job.longest_sample)} if replays(job) else {}
