"""What a rollout says of itself: the numbers of metrics.jsonl and the lines of samples.jsonl."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import Any

from megatron_r1.rollout.sampling import Group, Output


def rollout_metrics(groups: list[Group], version: int) -> dict[str, float]:
    """Means over the outputs of one rollout. `version`: the policy that trains on it.

    staleness: versions between the policy that made a token and the one it trains, mean over
    tokens."""
    outputs = [output for group in groups for output in group.outputs]
    rewards = [output.reward for output in outputs]
    lengths = [len(output.completion.token_ids) for output in outputs]
    versions = [v for output in outputs for v in output.completion.policy_versions]
    equal = [len({output.reward for output in group.outputs}) == 1 for group in groups]
    terms = outputs[0].rewards
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "accuracy": fmean(output.rewards["accuracy"] for output in outputs),
        **{f"{t}/mean": fmean(o.rewards[t] for o in outputs) for t in terms if t != "accuracy"},
        "response_length/mean": fmean(lengths),
        "response_length/max": max(lengths),
        "truncated": fmean(output.truncated for output in outputs),
        "groups/zero_variance": fmean(equal),
        "policy_version": version,
        "staleness": version - fmean(versions) if versions else 0.0,
        "response_tokens": sum(lengths),
    }


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
