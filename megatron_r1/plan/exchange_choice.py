"""The two ways to spend a trainer's memory: layers recomputed whole, or the experts' exchange
hidden, which Megatron refuses together (0.16.1): seconds and memory of each, and which fits."""

from itertools import islice

from megatron_r1.models.exchange_overlap import obstacles
from megatron_r1.plan.hidden_exchange import share_alone
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import rank_memory
from megatron_r1.plan.quantity import Quantity, Section, in_bytes
from megatron_r1.plan.rollout import Engines
from megatron_r1.plan.timing import StepTime

HIDDEN, WHOLE = "overlap, selective", "none, full"


def exchange_choice(job: PlannedJob, engines: Engines) -> Section:
    """Return the seconds of an optimizer step with the exchange hidden and selective recomputation,
    and with neither hidden and full recomputation; {} where experts are on one rank.

    Args:
        job: the planned job, for everything else.
        engines: the job's engines."""
    if not job.has_experts or job.parallel.expert == 1:
        return {}
    jobs = {HIDDEN: _hidden(job), WHOLE: _whole(job)}
    if blocked := list(islice(obstacles(jobs[HIDDEN].config, job.hf), 1)):
        why = f"not possible with {blocked[0].setting}: {blocked[0].why}"
        return {HIDDEN: Quantity(None, "s", why), WHOLE: _row(jobs[WHOLE], engines)}
    section = {name: _row(each, engines) for name, each in jobs.items()}
    ratio = section[WHOLE].number / section[HIDDEN].number
    fitting = [name for name, each in jobs.items() if _peak(each) <= each.hardware.memory]
    verdict = {0: "neither fits", 1: f"only '{fitting[0]}' fits" if fitting else "", 2: "both fit"}
    formula = f"{WHOLE} / {HIDDEN}; {verdict[len(fitting)]}"
    return section | {"saved time": Quantity(ratio, "x", formula)}


def _hidden(job: PlannedJob) -> PlannedJob:
    """Return the job with the overlap: with its own modules, or those of DeepSeek-V3's report
    (section 3.2.3)."""
    modules = job.parallel.recompute_modules
    if job.parallel.recompute != "selective" or "moe" in modules:
        modules = ["layernorm", *["mla_up_proj"] * job.latent_attention, "moe_act"]
    return job.with_parallel(
        overlap_expert_exchange=True, recompute="selective", recompute_modules=modules
    )


def _whole(job: PlannedJob) -> PlannedJob:
    return job.with_parallel(overlap_expert_exchange=False, recompute="full")


def _peak(job: PlannedJob) -> int:
    return max(rank.peak for rank in rank_memory(job))


def _row(job: PlannedJob, engines: Engines) -> Quantity:
    times = StepTime(job, engines)
    rank, parallel = times.busiest, job.parallel
    needed, memory = in_bytes(_peak(job)), in_bytes(job.hardware.memory)
    fits = "fits" if _peak(job) <= job.hardware.memory else "does not fit"
    what = "every layer" if parallel.recompute == "full" else ", ".join(parallel.recompute_modules)
    exchange = times.exchange(rank)
    formula = (
        f"an optimizer step; {needed} of {memory} on the fullest rank: {fits}. Recomputed: {what}. "
        f"{exchange:.2g} s of the exchange of a micro-batch exposed"
    )
    if parallel.overlap_expert_exchange:
        formula += f", {1 - share_alone(job, rank):.0%} of its passes combined with another's"
    return Quantity(times.optimizer_step(), "s", formula)
