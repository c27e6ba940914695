"""The seconds of one step by part, each with its range: rollout, logprobs, optimizer steps, push,
and what lies between them.

Between them engines load pushed weights, sleep and wake, or the trainer saves a checkpoint."""

import json
from functools import lru_cache

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.memory import checkpoint_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.expert_balancer import EXPERT_MOVES, expert_move_time
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.offload import OFFLOAD, offload_time
from megatron_r1.plan.push_costs import (
    drafts_with_mtp,
    planned_engine_layout,
    planned_rank_bytes,
    push_link,
)
from megatron_r1.plan.quantity import (
    Quantity,
    QuantityTable,
    byte_quantity,
    range_ends,
    sum_quantities,
    total_hours,
)
from megatron_r1.plan.sample_traffic import ROUTED_EXPERTS, routing_replay_time
from megatron_r1.plan.step_time import STALLS, StepTime
from megatron_r1.plan.time_ranges import with_range
from megatron_r1.push.matching import EngineLayout
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.reporting.formatting import format_count


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
        section["logprobs"] = Quantity(times.logprobs_seconds(), "s", _logprobs_formula(times))
    if job.trains:
        section |= _training_section(times)
    if job.critic:
        critic = StepTime(job.critic, times.engines)
        seconds = critic.logprobs_seconds() + critic.optimizer_step_seconds() * job.num_minibatches
        section["critic"] = Quantity(seconds, "s", "one forward pass for values, and its training")
    if job.verb == "rl":
        section |= offload_time(job, times.push_seconds())
        formula = f"bytes into an engine GPU / its {push_link(job)[1]}"
        section["push"] = Quantity(times.push_seconds(), "s", formula)
        section["load"] = weight_load_time(job)
        section |= expert_move_time(job)
        if job.config.rollout.colocated:
            section["sleep and wake"] = sleep_wake_time(job)
    if job.trains:
        section["saves"] = checkpoint_time(job)
    section = {name: with_range(times, name, quantity) for name, quantity in section.items()}
    parts = [name for name in TIME_PARTS if name in section]
    if missing := [name for name in parts if section[name].value is None]:
        reason = f"none without {missing[0]}: {section[missing[0]].formula}"
        return section | {"step": Quantity(None, "s", reason)}
    section["step"] = _step_seconds(times, {name: section[name] for name in parts})
    step, tokens = section["step"], job.num_responses * job.mean_sample_tokens
    if job.verb == "rl" and times.engines.rollouts_in_flight == 1:
        fraction = section["rollout"].number / step.number
        section["share of rollout"] = Quantity(fraction, "share", "rollout / step")
    if ROUTED_EXPERTS in section:
        fraction = section[ROUTED_EXPERTS].number / step.number
        section[f"share of {ROUTED_EXPERTS}"] = Quantity(
            fraction, "share", f"{ROUTED_EXPERTS} / step"
        )
    value, low, high = range_ends(step)
    section["tokens per second"] = Quantity(
        tokens / value, "tokens", f"{tokens:,} tokens / step", tokens / high, tokens / low
    )
    if job.trains and (steps := job.num_steps) is not None:
        section["run"] = total_hours(step, steps, f"step x run.steps={steps}")
    return section


TIME_PARTS = (
    "rollout",
    ROUTED_EXPERTS,
    "logprobs",
    "training",
    "critic",
    OFFLOAD,
    "push",
    "load",
    EXPERT_MOVES,
    "sleep and wake",
    "saves",
)
"""The parts of a step, in order."""
PUSH_PARTS = (OFFLOAD, "push", "load", EXPERT_MOVES, "sleep and wake")
"""Parts that stop trainer and engines."""


def _step_seconds(times: StepTime, parts: dict[str, Quantity]) -> Quantity:
    """Return the seconds of a step.

    With `rl.staleness` k, and engines on GPUs of their own, a rollout begins k pushes before the
    step that trains on it: in k + 1 steps it is sampled and trained on, so that a step takes at
    least their (k + 1)-th part, the trainer's own time, and the time of as many tokens on engines
    that later rollouts keep full. A push stops trainer and engines."""
    job, engines = times.job, times.engines
    if engines.rollouts_in_flight == 1:
        return sum_quantities(parts.values(), " + ".join(parts))
    ends = {name: range_ends(part) for name, part in parts.items()}
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


def _logprobs_formula(times: StepTime) -> str:
    """Return the passes for a rollout's log-probabilities, and the host's waits in them."""
    job, rank = times.job, times.busiest_rank
    passes, waits = "a forward pass of the policy", times.host_wait_seconds(rank, False)
    if job.computes_ref_logprobs:
        passes = "forward passes of policy and reference"
        waits += times.host_wait_seconds(rank, False, by_reference=True)
    if not waits:
        return passes
    seconds = waits * job.num_microbatches * job.num_minibatches
    return f"{passes}; of it the host waits {seconds:.2g} s for counts of experts' tokens"


def _training_section(times: StepTime) -> QuantityTable:
    job, count, rank = times.job, times.job.num_microbatches, times.busiest_rank
    update_seconds = times.optimizer_step_seconds()
    waits = times.host_wait_seconds(rank, True)
    waits_text = f" + {waits:.2g} s waits of the host" if waits else ""
    step_formula = (
        f"{format_count(count, 'micro-batch')} x ("
        f"{times.compute_seconds(rank, True):.2g} s compute + "
        f"{times.exposed_communication_seconds(rank, True):.2g} s communication + "
        f"{times.pipeline_stall_seconds(True):.2g} s hops"
        f"{waits_text}) / (1 - bubble)"
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
        STALLS: Quantity(
            times.pipeline_stall_seconds(True) * count,
            "s",
            f"of an optimizer step: {2 * job.num_model_chunks * count:,} hops x "
            f"{times.hop_seconds:.2g} s for the states' bytes"
            if times.hop_seconds
            else "one pipeline stage",
        ),
        "training": Quantity(update_seconds * job.num_minibatches, "s", steps_text),
    }


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
    """Return a step's share of the seconds in which a checkpoint stops the trainer.

    These are of its copy to the host and, unless `checkpoint.asynchronous`, of its writing."""
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
