"""What the reward workers are at."""

from __future__ import annotations

from megatron_r1.rewards.runtime.pool import OutstandingJob
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.supervision.findings import Finding, seconds
from megatron_r1.supervision.inspect_engines import describe_group


def inspect_rewards(rollouts: RolloutCollector) -> Finding:
    """Headline: how many groups are graded, the worker that has been at it longest, with what."""
    oldest = rollouts.in_flight.oldest("grading")
    jobs = rollouts.pool.jobs()
    details = [f"oldest group: {describe_group(oldest)}"] if oldest else []
    details += [f"counters: {rollouts.pool.snapshot()}"]
    details += [_describe(job) for job in jobs]
    headline = f"rewards: {rollouts.in_flight.count('grading')} groups are being graded"
    if jobs:
        headline += f"; {_describe(jobs[0])}"
    elif oldest:
        headline += f"; no worker has one of them, so a served model has: {describe_group(oldest)}"
    return Finding("rewards", headline, details)


def _describe(job: OutstandingJob) -> str:
    where = f"worker {job.process}" if job.process else "queued"
    question = (job.question or "").replace("\n", " ")[:80]
    return f"{where}: {job.target}, question {question!r}, since {seconds(job.seconds)}"
