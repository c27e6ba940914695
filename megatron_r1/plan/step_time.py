"""Seconds of the parts that one GPU computes or sends in a step: micro-batches, optimizer steps
and the push."""

from functools import cache, cached_property, partial

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.plan.communication import traffic_by_axis
from megatron_r1.plan.engine_communication import NCCL
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.exchange_overlap_time import expert_flops, exposed_seconds, unpaired_fraction
from megatron_r1.plan.flops import attention_flops, head_flops, layer_flops
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import push_link, pushed_rank_bytes
from megatron_r1.plan.rollout import TENSOR_SUMS, RolloutTime
from megatron_r1.plan.sample_traffic import uses_routing_replay

STALLS = "pipeline stalls"
"""The part of an optimizer step in which ranks wait for their neighbors' tensors."""
LINK_PARTS = (STALLS, NCCL, TENSOR_SUMS)
"""Parts that are communication between GPUs alone."""
HIDDEN_AXES = ("data", "pipeline")
"""Axes whose traffic is not exposed: the data axis's is hidden behind computation
(overlap_grad_reduce), the pipeline's is counted in `StepTime.pipeline_stall_seconds`. Context
parallelism's is hidden behind attention while that lasts; tensor's and expert's is exposed, which
is pessimistic where Transformer Engine overlaps it; but see `StepTime.expert_exchange_seconds`."""


class StepTime:
    """Step times of a job with the given engines."""

    def __init__(self, job: PlannedJob, engines: EngineMemory):
        self.job, self.engines = job, engines
        self.mean_sample_tokens = job.mean_sample_tokens
        self.traffic_by_axis = cache(partial(traffic_by_axis, job))

    @cached_property
    def rollout(self) -> RolloutTime:
        """The seconds that a rollout takes on the engines, by part."""
        return RolloutTime(self.engines)

    @cached_property
    def busiest_rank(self) -> int:
        """The pipeline rank with the longest micro-batch."""
        return max(
            range(self.job.parallel.pipeline), key=lambda r: self.microbatch_seconds(r, True)
        )

    def compute_seconds(self, rank: int, with_backward: bool) -> float:
        """Return seconds of one mean micro-batch's matrix products on a pipeline rank."""
        job = self.job
        counts = zip(self._layer_flops, job.num_layers_of_kinds(rank), strict=True)
        flops = sum(operations * count for operations, count in counts) * self._forward_passes(
            with_backward
        )
        if any(chunk.head for chunk in job.pipeline_stages[rank]):
            flops += head_flops(job.hf_config) * (3 if with_backward else 1)
        return self._seconds_of_flops(flops)

    def exposed_communication_seconds(self, rank: int, with_backward: bool) -> float:
        """Return seconds of one micro-batch's communication that computation does not hide."""
        seconds = {
            name: group.seconds(
                self.job, group.microbatch_bytes if with_backward else group.forward_bytes
            )
            for name, group in self.traffic_by_axis(rank).items()
            if name not in HIDDEN_AXES
        }
        if "context" in seconds:
            attention = attention_flops(self.job.hf_config, self.mean_sample_tokens) * sum(
                self.job.num_layers_of_kinds(rank)
            )
            attention_seconds = self._seconds_of_flops(
                attention * self._forward_passes(with_backward)
            )
            seconds["context"] = max(0.0, seconds["context"] - attention_seconds)
        if "expert" in seconds and with_backward:
            seconds["expert"] = self.expert_exchange_seconds(rank)
        return sum(seconds.values())

    def expert_exchange_seconds(self, rank: int) -> float:
        """Return seconds of one micro-batch's exchange with experts' ranks that computation does
        not hide, forward and backward."""
        group = self.traffic_by_axis(rank)["expert"]
        _, sparse = self.job.num_layers_of_kinds(rank)
        seconds = group.seconds(self.job, group.microbatch_bytes)
        if not self.job.parallel.overlap_expert_exchange or not sparse:
            return seconds
        experts = (
            expert_flops(self.job, self.job.is_sparse_layer.index(True)) / self._matmul_speedup
        )
        parts = (self._layer_flops[1] - experts, experts)
        transfer_seconds = group.seconds(self.job, group.forward_bytes) / (2 * sparse)
        paired_seconds = sparse * exposed_seconds(
            transfer_seconds, *map(self._seconds_of_flops, parts)
        )
        unpaired = unpaired_fraction(self.job, rank)
        return unpaired * seconds + (1 - unpaired) * paired_seconds

    @property
    def _matmul_speedup(self) -> float:
        """How many times as fast as bf16's the products of layers are."""
        job = self.job
        return 1.0 if job.config.fp8.recipe == "none" else job.assumptions.fp8_speedup

    @cached_property
    def _layer_flops(self) -> tuple[float, float]:
        """Forward FLOP of a token through a dense and a sparse layer, as bf16 computes in their
        time; 0 if the model has none."""
        job = self.job
        layer_of_kind = {sparse: layer for layer, sparse in enumerate(job.is_sparse_layer)}
        dense, sparse = (
            layer_flops(job, layer_of_kind[kind], self.mean_sample_tokens, self._matmul_speedup)
            if kind in layer_of_kind
            else 0.0
            for kind in (False, True)
        )
        return dense, sparse

    def _forward_passes(self, with_backward: bool) -> int:
        """Return a layer's work in forward passes."""
        return 3 + (self.job.parallel.recompute == "full") if with_backward else 1

    def _seconds_of_flops(self, flops: float) -> float:
        """Return seconds of `flops` per token for a rank's share of a mean micro-batch."""
        job = self.job
        fraction = job.mean_microbatch_tokens / job.parallel.tensor
        return flops * fraction / (job.hardware.bf16 * job.assumptions.compute_efficiency)

    def microbatch_seconds(self, rank: int, with_backward: bool) -> float:
        """Return the seconds of a mean micro-batch on pipeline rank `rank`.

        They are of its computation, of the communication that it does not hide, of the pipeline's
        hops, and of the host's waits."""
        return (
            self.compute_seconds(rank, with_backward)
            + self.exposed_communication_seconds(rank, with_backward)
            + self.pipeline_stall_seconds(with_backward)
            + self.host_wait_seconds(rank, with_backward)
        )

    def host_wait_seconds(
        self, rank: int, with_backward: bool, *, by_reference: bool = False
    ) -> float:
        """Return seconds of one micro-batch in which the host waits for counts of experts' tokens.

        It waits once in a layer of experts, and again where recomputation counts anew. With routing
        replay the policy's counts are known (`models.token_dispatcher`).

        Args:
            rank: the pipeline rank.
            with_backward: whether the pass has a backward pass.
            by_reference: whether the reference computes, whose routers choose themselves."""
        job, parallel = self.job, self.job.parallel
        uses_deepep = parallel.dispatcher == "flex"
        if uses_routing_replay(job) and not (by_reference or uses_deepep):
            return 0.0
        recomputes_experts = parallel.recompute == "full" or (
            parallel.recompute == "selective" and "moe" in parallel.recompute_modules
        )
        waits_again = with_backward and recomputes_experts and (uses_deepep or job.plain_megatron)
        _, sparse_layers = job.num_layers_of_kinds(rank)
        return sparse_layers * (1 + waits_again) * job.assumptions.host_stall_seconds

    @cached_property
    def hop_seconds(self) -> float:
        """Seconds in which a rank waits for a neighbor's tensor: its bytes and, in plain Megatron,
        the host's wait behind them (`batch_p2p_sync`)."""
        pipeline = self.traffic_by_axis(0).get("pipeline")
        if pipeline is None:
            return 0.0
        transfer_seconds = pipeline.seconds(
            self.job, pipeline.forward_bytes / self.job.num_model_chunks
        )
        stall_seconds = self.job.assumptions.host_stall_seconds if self.job.plain_megatron else 0.0
        return stall_seconds + transfer_seconds

    def pipeline_stall_seconds(self, with_backward: bool) -> float:
        """Return seconds of one micro-batch's hops: one for each chunk forward, one back."""
        return self.hop_seconds * self.job.num_model_chunks * (2 if with_backward else 1)

    def idle_fraction(self, microbatches: int, slots: int) -> float:
        """Return the share of time in which a rank is idle: 1 - V m / (V slots + P - 1)."""
        virtual, stages = self.job.num_model_chunks, self.job.parallel.pipeline
        return 1 - virtual * microbatches / (virtual * slots + stages - 1)

    def optimizer_step_seconds(self) -> float:
        """Return seconds of all micro-batches, and of the gradients' last bytes."""
        rank, count = self.busiest_rank, self.job.num_microbatches
        pipeline_seconds = (
            self.microbatch_seconds(rank, True)
            * count
            / (1 - self.idle_fraction(count, self.job.schedule_slots))
        )
        data_traffic = self.traffic_by_axis(rank).get("data")
        gradient_seconds = (
            data_traffic.seconds(self.job, data_traffic.step_bytes) if data_traffic else 0.0
        )
        return pipeline_seconds + gradient_seconds * self.job.assumptions.gradients_exposed

    def logprobs_seconds(self) -> float:
        """Seconds of a step's passes without gradients."""
        job = self.job
        count = job.num_microbatches * job.num_minibatches
        slots = job.schedule_slots * job.num_minibatches
        rank = self.busiest_rank
        seconds = self.microbatch_seconds(rank, False)
        if job.computes_ref_logprobs:
            known_seconds = self.host_wait_seconds(rank, False)
            waits = self.host_wait_seconds(rank, False, by_reference=True) - known_seconds
            seconds += seconds + waits
        return seconds * count / (1 - self.idle_fraction(count, slots))

    def communication_fraction(self, name: str) -> float:
        """Return the share (0 to 1) of a part's seconds that is communication between GPUs.

        Args:
            name: the part of a step."""
        if name == "rollout":
            return self.rollout.exchange_fraction
        if name == "push":
            return float(not TRANSPORTS[self.job.config.push.transport].is_single_node)
        if name in LINK_PARTS:
            return 1.0
        if name in ("logprobs", "training", "optimizer step", "critic"):
            backward = name != "logprobs"
            seconds = self.exposed_communication_seconds(self.busiest_rank, backward)
            seconds += self.pipeline_stall_seconds(backward)
            return seconds / self.microbatch_seconds(self.busiest_rank, backward)
        return 0.0

    def push_seconds(self) -> float:
        """Seconds of a push, by the bytes of the engine GPU that receives most."""
        return pushed_rank_bytes(self.job) / push_link(self.job)[0]
