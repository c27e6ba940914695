"""What a rollout says of itself: the numbers of metrics.jsonl and the lines of samples.jsonl."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import Any

from megatron_r1.rl.sampling import Collected, Group, Output


def rollout_metrics(rollout: Collected, version: int) -> dict[str, float]:
    """Means over the outputs of one rollout, those that are not trained on included. `version`: the
    policy that trains on it.

    Rewards: of the outputs that were graded; rewards/ungraded is the share of the others.
    staleness: versions between the policy that made a token and the one it trains, mean over
    tokens."""
    groups = rollout.groups + rollout.passed_over
    outputs = [output for group in groups for output in group.outputs]
    rewards = [output.reward for output in outputs if output.is_graded] or [0.0]
    lengths = [len(output.completion.token_ids) for output in outputs]
    versions = sum(sum(output.completion.policy_versions) for output in outputs)
    equal = [len({o.reward for o in group.outputs if o.is_graded}) < 2 for group in groups]
    means = {term: _mean(term, outputs) for term in outputs[0].rewards}
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "accuracy": means.pop("accuracy"),
        **{f"{term}/mean": mean for term, mean in means.items()},
        "rewards/ungraded": fmean(not output.is_graded for output in outputs),
        "response_length/mean": fmean(lengths),
        "response_length/max": max(lengths),
        "truncated": fmean(output.truncated for output in outputs),
        "groups/zero_variance": fmean(equal),
        "groups/passed_over": len(rollout.passed_over),
        "policy_version": version,
        "staleness": version - versions / sum(lengths) if any(lengths) else 0.0,
        "response_tokens": sum(lengths),
    }


def _mean(term: str, outputs: list[Output]) -> float:
    return fmean([o.rewards[term] for o in outputs if term not in o.ungraded] or [0.0])


def sample_records(
    groups: list[Group], step: int, split: str, limit: int | None
) -> list[dict[str, Any]]:
    """Lines for samples.jsonl: the first output of `limit` groups, or every output of all."""
    if limit is None:
        chosen = [(group, output) for group in groups for output in group.outputs]
    else:
        chosen = [(group, group.outputs[0]) for group in groups[:limit]]
    return [_record(group, output, step, split) for group, output in chosen]


def _record(group: Group, output: Output, step: int, split: str) -> dict[str, Any]:
    versions = output.completion.policy_versions
    return {
        "step": step,
        "split": split,
        "id": group.prompt.id,
        "question": group.prompt.question,
        "truth": group.prompt.truth,
        "response": output.text,
        "reward": output.reward,
        "rewards": output.rewards,
        "reason": output.reason,
        "length": len(output.completion.token_ids),
        "policy_version": versions[-1] if versions else None,
    }
