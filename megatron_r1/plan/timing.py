"""Seconds of one step (rollout, scoring, optimizer steps, push, and what lies between them) under
the stated assumptions, with their ranges and the measurements that narrow these.

A range is the estimate over and times `Assumptions.time_spread`, which is how far the plan is off
published runs (`published_runs.py`). What `--calibrate` has measured has none; of what was measured
on fewer GPUs than are planned, communication has one."""

from collections.abc import Iterable
from functools import cache, cached_property, partial

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.plan.communication import traffic_by_axis
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.expert_overlap import expert_flops, exposed_seconds, unpaired_fraction
from megatron_r1.plan.flops import attention_flops, head_flops, layer_flops
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.offload import OFFLOAD, offload_time
from megatron_r1.plan.phase_overheads import checkpoint_time, sleep_wake_time, weight_load_time
from megatron_r1.plan.push import push_link, pushed_rank_bytes
from megatron_r1.plan.quantity import Quantity, QuantityTable
from megatron_r1.plan.rollout import RolloutTime
from megatron_r1.plan.sample_traffic import ROUTED_EXPERTS, routing_replay_time
from megatron_r1.reporting.formatting import format_count

MEASUREMENTS = {
    "rollout": "seconds of a decoding pass",
    "scoring": "seconds of a micro-batch",
    "training": "seconds of a micro-batch",
    "critic": "seconds of a micro-batch",
    "push": "seconds between phases",
    "load": "seconds between phases",
    "sleep and wake": "seconds between phases",
    "saves": "seconds between phases",
    OFFLOAD: "seconds between phases",
}
"""The check of tools/gpu_check that measures the number of a part."""
UNMEASURED_NUMBERS = ("local_disk", "group_rank_seconds")
"""Numbers that no check measures."""


def narrowing_number(job: PlannedJob, name: str) -> str | None:
    """Return the number that, measured on the hardware that is planned, closes the range of a part
    (it is solved for so that the plan takes the measured seconds); None for what has no range."""
    if name == OFFLOAD:
        to_disk = job.config.parallel.offload_between_phases == "disk"
        return "local_disk" if to_disk else "host_link"
    if name in ("scoring", "training", "optimizer step", "critic"):
        return "compute_efficiency"
    engine_number = "decode_latency_per_layer" if job.engine_gpus > 1 else "bandwidth_efficiency"
    numbers = {
        "rollout": engine_number,
        ROUTED_EXPERTS: "host_network",
        "set-up": "group_rank_seconds",
        "push": "push_efficiency",
        "load": "tensor_load_seconds",
        "sleep and wake": "wake_seconds",
        "saves": "host_link" if job.config.checkpoint.asynchronous else "storage",
    }
    return numbers.get(name)


WIDE_RANGE_RATIO = 2.0
"""A range whose ends differ by more names the measurement that would close it."""


def with_range(times: "StepTime", name: str, quantity: Quantity) -> Quantity:
    """Return an estimate of time with its range; others, and those without a value, as they are.

    Args:
        times: the times of the planned job.
        name: the part of a step, or the set-up of the push.
        quantity: its estimated seconds."""
    job = times.job
    number = narrowing_number(job, name)
    if number is None or quantity.value is None:
        return quantity
    assumed_fraction = 1.0
    if number in job.calibration.names:
        if job.calibration.num_gpus >= job.num_gpus:
            return quantity
        # Fewer GPUs than are planned do not show their communication.
        assumed_fraction = times.communication_fraction(name)
    if not assumed_fraction:
        return quantity
    return quantity.with_spread(job.assumptions.time_spread, assumed_fraction)


def narrowing_section(job: PlannedJob, time: QuantityTable) -> QuantityTable:
    """Return the width of each part's range beyond `WIDE_RANGE_RATIO`, with the measurement
    that closes it."""
    section: QuantityTable = {}
    for name, part in time.items():
        number = narrowing_number(job, name)
        if name not in (*MEASUREMENTS, ROUTED_EXPERTS) or number in UNMEASURED_NUMBERS:
            continue
        if not part.low or part.high is None:
            continue
        if (width := part.high / part.low) > WIDE_RANGE_RATIO:
            section[name] = Quantity(width, "x", f"{_narrowing_command(job, name)}: {number}")
    return section


def _narrowing_command(job: PlannedJob, name: str) -> str:
    """Return what measures the number of a part, and how the plan is told of it."""
    if narrowing_number(job, name) in job.calibration.names:
        # On fewer GPUs, which say little of its communication.
        return f"a run of {job.num_gpus:,} GPUs, then --calibrate-from its folder"
    if name == ROUTED_EXPERTS:
        return "the preflight with --preflight.calibration FILE, then --calibrate FILE"
    check = MEASUREMENTS[name]
    return f"tools/gpu_check --only {check!r}, then --calibrate with the file that it writes"


HIDDEN_AXES = ("data", "pipeline")
"""Axes whose traffic is not exposed: the data axis's is hidden behind computation
(overlap_grad_reduce), the pipeline's is counted in `StepTime.pipeline_stall_seconds`. Context
parallelism's is hidden behind attention while that lasts; tensor's and expert's is exposed, which
is pessimistic where Transformer Engine overlaps it; but see `StepTime.expert_exchange_seconds`."""


class StepTime:
    """Step times of a job with the given engines."""

    def __init__(self, job: PlannedJob, engines: EngineMemory):
        self.job, self.engines = job, engines
        self.sample_tokens = job.sample_tokens
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
        flops = sum(operations * count for operations, count in counts) * self._passes(
            with_backward
        )
        if any(chunk.head for chunk in job.stages[rank]):
            flops += head_flops(job.hf_config) * (3 if with_backward else 1)
        return self._seconds(flops)

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
            attention = attention_flops(self.job.hf_config, self.sample_tokens) * sum(
                self.job.num_layers_of_kinds(rank)
            )
            attention_seconds = self._seconds(attention * self._passes(with_backward))
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
        experts = expert_flops(self.job, self.job.is_sparse_layer.index(True)) / self._speedup
        parts = (self._layer_flops[1] - experts, experts)
        transfer_seconds = group.seconds(self.job, group.forward_bytes) / (2 * sparse)
        paired_seconds = sparse * exposed_seconds(transfer_seconds, *map(self._seconds, parts))
        unpaired = unpaired_fraction(self.job, rank)
        return unpaired * seconds + (1 - unpaired) * paired_seconds

    @property
    def _speedup(self) -> float:
        """How many times as fast as bf16's the products of layers are."""
        job = self.job
        return 1.0 if job.config.fp8.recipe == "none" else job.assumptions.fp8_speedup

    @cached_property
    def _layer_flops(self) -> tuple[float, float]:
        """Forward FLOP of a token through a dense and a sparse layer, as many as bf16 computes in
        their time; 0 if the model has none."""
        job = self.job
        layer_of_kind = {sparse: layer for layer, sparse in enumerate(job.is_sparse_layer)}
        dense, sparse = (
            layer_flops(job, layer_of_kind[kind], self.sample_tokens, self._speedup)
            if kind in layer_of_kind
            else 0.0
            for kind in (False, True)
        )
        return dense, sparse

    def _passes(self, with_backward: bool) -> int:
        """Return a layer's work in forward passes."""
        return 3 + (self.job.parallel.recompute == "full") if with_backward else 1

    def _seconds(self, flops: float) -> float:
        """Return seconds of `flops` per token for a rank's share of a mean micro-batch."""
        job = self.job
        fraction = job.rank_tokens / job.parallel.tensor
        return flops * fraction / (job.hardware.bf16 * job.assumptions.compute_efficiency)

    def microbatch_seconds(self, rank: int, with_backward: bool) -> float:
        """Return the seconds of a mean micro-batch on pipeline rank `rank`: of its computation, of
        the communication that it does not hide, and of the pipeline's hops."""
        return (
            self.compute_seconds(rank, with_backward)
            + self.exposed_communication_seconds(rank, with_backward)
            + self.pipeline_stall_seconds(with_backward)
        )

    @cached_property
    def hop_seconds(self) -> float:
        """Seconds in which a rank waits for a neighbor's tensor: the host, then the bytes."""
        pipeline = self.traffic_by_axis(0).get("pipeline")
        if pipeline is None:
            return 0.0
        transfer_seconds = pipeline.seconds(
            self.job, pipeline.forward_bytes / self.job.num_model_chunks
        )
        return self.job.assumptions.host_stall_seconds + transfer_seconds

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

    def scoring_seconds(self) -> float:
        """Seconds of a step's passes without gradients."""
        job = self.job
        count = job.num_microbatches * job.num_minibatches
        slots = job.schedule_slots * job.num_minibatches
        pass_seconds = (
            self.microbatch_seconds(self.busiest_rank, False)
            * count
            / (1 - self.idle_fraction(count, slots))
        )
        return pass_seconds * (2 if job.computes_ref_logprobs else 1)

    def communication_fraction(self, name: str) -> float:
        """Return the share (0 to 1) of a part's seconds that is communication between GPUs.

        Args:
            name: the part of a step."""
        if name == "rollout":
            return self.rollout.exchange_fraction
        if name == "push":
            return float(not TRANSPORTS[self.job.config.push.transport].is_single_host)
        if name in ("scoring", "training", "critic"):
            backward = name != "scoring"
            seconds = self.exposed_communication_seconds(self.busiest_rank, backward)
            seconds += self.pipeline_stall_seconds(backward)
            return seconds / self.microbatch_seconds(self.busiest_rank, backward)
        return 0.0

    def push_seconds(self) -> float:
        """Seconds of a push, by the bytes of the engine GPU that receives most."""
        return pushed_rank_bytes(self.job) / push_link(self.job)[0]


def time_section(times: StepTime) -> QuantityTable:
    """Return seconds of one step and its parts, each with its range; without a trainer, of all
    responses."""
    job = times.job
    section = {}
    if job.generates:
        seconds, rollout_formula = times.rollout.seconds()
        section["rollout"] = Quantity(seconds, "s", rollout_formula)
    section |= routing_replay_time(job)
    if job.verb == "rl":
        passes = "a forward pass of the policy"
        if job.computes_ref_logprobs:
            passes = "forward passes of policy and reference"
        section["scoring"] = Quantity(times.scoring_seconds(), "s", passes)
    if job.trains:
        section |= _training(times)
    if job.critic:
        critic = StepTime(job.critic, times.engines)
        seconds = critic.scoring_seconds() + critic.optimizer_step_seconds() * job.num_minibatches
        section["critic"] = Quantity(seconds, "s", "one forward pass for values, and its training")
    if job.verb == "rl":
        section |= offload_time(job, times.push_seconds())
        formula = f"bytes into an engine GPU / its {push_link(job)[1]}"
        section["push"] = Quantity(times.push_seconds(), "s", formula)
        section["load"] = weight_load_time(job)
        if job.config.rollout.colocated:
            section["sleep and wake"] = sleep_wake_time(job)
    if job.trains:
        section["saves"] = checkpoint_time(job)
    section = {name: with_range(times, name, quantity) for name, quantity in section.items()}
    parts = [name for name in TIME_PARTS if name in section]
    if missing := [name for name in parts if section[name].value is None]:
        reason = f"none without {missing[0]}: {section[missing[0]].formula}"
        return section | {"step": Quantity(None, "s", reason)}
    section["step"] = _step(times, {name: section[name] for name in parts})
    step, tokens = section["step"], job.num_responses * job.sample_tokens
    if job.verb == "rl" and times.engines.rollouts_in_flight == 1:
        fraction = section["rollout"].number / step.number
        section["share of rollout"] = Quantity(fraction, "share", "rollout / step")
    if ROUTED_EXPERTS in section:
        fraction = section[ROUTED_EXPERTS].number / step.number
        section[f"share of {ROUTED_EXPERTS}"] = Quantity(
            fraction, "share", f"{ROUTED_EXPERTS} / step"
        )
    section["tokens per second"] = Quantity(
        tokens / step.number, "tokens", f"{tokens:,} tokens / step"
    )
    if job.trains and (steps := job.num_steps) is not None:
        section["run"] = total_hours(step, steps, f"step x run.steps={steps}")
    return section


TIME_PARTS = (
    "rollout",
    ROUTED_EXPERTS,
    "scoring",
    "training",
    "critic",
    OFFLOAD,
    "push",
    "load",
    "sleep and wake",
    "saves",
)
"""The parts of a step, in order."""
PUSH_PARTS = (OFFLOAD, "push", "load", "sleep and wake")
"""Parts that stop trainer and engines."""


def total_hours(step: Quantity, steps: float, formula: str) -> Quantity:
    """Return the hours of so many steps, with their range.

    Args:
        step: seconds of a step.
        steps: how many.
        formula: how the hours were computed, as the report shows it."""
    value, low, high = (end * steps / 3600 for end in _ends(step))
    return Quantity(value, "hours", formula, low, high)


def sum_quantities(parts: Iterable[Quantity], formula: str) -> Quantity:
    """Return the sum of quantities of one unit, with its range."""
    parts = list(parts)
    value, low, high = map(sum, zip(*map(_ends, parts), strict=True))
    return Quantity(value, parts[0].unit, formula, low, high)


def _ends(quantity: Quantity) -> tuple[float, float, float]:
    """Return (estimate, low, high); without a range all are equal."""
    number = quantity.number
    low, high = quantity.low, quantity.high
    return number, number if low is None else low, number if high is None else high


def _step(times: StepTime, parts: dict[str, Quantity]) -> Quantity:
    """Return the seconds of a step.

    With `rl.staleness` k, and engines on GPUs of their own, a rollout begins k pushes before the
    step that trains on it: in k + 1 steps it is sampled and trained on, so that a step takes at
    least their (k + 1)-th part, the trainer's own time, and the time of as many tokens on engines
    that later rollouts keep full. A push stops trainer and engines."""
    job, engines = times.job, times.engines
    if engines.rollouts_in_flight == 1:
        return sum_quantities(parts.values(), " + ".join(parts))
    ends = {name: _ends(part) for name, part in parts.items()}
    rollout = ends.pop("rollout")
    push_ends = [ends.pop(name) for name in PUSH_PARTS if name in ends]
    # Of the rollout's seconds, those that engines kept full would need.
    full_fraction = times.rollout.throughput_seconds / rollout[0]
    num_rollouts = engines.rollouts_in_flight
    steps = []
    for end in range(3):
        trainer_seconds = sum(part[end] for part in ends.values())
        longest_seconds = max(
            trainer_seconds,
            full_fraction * rollout[end],
            (rollout[end] + trainer_seconds) / num_rollouts,
        )
        steps.append(sum(part[end] for part in push_ends) + longest_seconds)
    value, low, high = steps
    push_names = " + ".join(name for name in PUSH_PARTS if name in parts)
    formula = (
        f"{push_names} + the longest of {' + '.join(ends)}; {full_fraction * rollout[0]:,.0f} s "
        f"for a rollout's tokens on full engines; (rollout + those of the trainer) / "
        f"{num_rollouts}, with rl.staleness={job.config.rl.staleness}"
    )
    return Quantity(value, "s", formula, low, high)


def _training(times: StepTime) -> QuantityTable:
    job, count, rank = times.job, times.job.num_microbatches, times.busiest_rank
    update_seconds = times.optimizer_step_seconds()
    step_formula = (
        f"{format_count(count, 'micro-batch')} x ("
        f"{times.compute_seconds(rank, True):.2g} s compute + "
        f"{times.exposed_communication_seconds(rank, True):.2g} s communication + "
        f"{times.pipeline_stall_seconds(True):.2g} s hops) / (1 - bubble)"
    )
    bubble_formula = (
        f"1 - V x {count} / (V x {format_count(job.schedule_slots, 'slot')} + P - 1), "
        f"V = {format_count(job.num_model_chunks, 'chunk')}, P = "
        f"{format_count(job.parallel.pipeline, 'stage')}"
    )
    steps_text = format_count(job.num_minibatches, "optimizer step")
    return {
        "optimizer step": Quantity(update_seconds, "s", step_formula),
        "bubble": Quantity(times.idle_fraction(count, job.schedule_slots), "share", bubble_formula),
        "pipeline stalls": Quantity(
            times.pipeline_stall_seconds(True) * count,
            "s",
            f"of an optimizer step: {2 * job.num_model_chunks * count:,} hops x "
            f"{times.hop_seconds:.2g} s, of it "
            f"{job.assumptions.host_stall_seconds:g} s host_stall_seconds and the states' bytes"
            if times.hop_seconds
            else "one pipeline stage",
        ),
        "training": Quantity(update_seconds * job.num_minibatches, "s", steps_text),
    }
