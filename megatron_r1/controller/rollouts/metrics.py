"""Metrics of a step: means over its rollout's responses and episodes, and over its updates."""

from collections import Counter
from statistics import fmean, pstdev

import numpy as np
from r1_grading.terms import ACCURACY

from megatron_r1.base.processes import timeline
from megatron_r1.controller.rollouts.rollout import Rollout, all_responses
from megatron_r1.engines.episodes import STATUSES, Episode


@timeline.timed("controller/metrics")
def rollout_metrics(rollout: Rollout, policy_version: int) -> dict[str, float]:
    """Return means over the responses of a rollout, including filtered groups.

    Reward means are over graded responses, and rewards/ungraded is the share of the others.
    `staleness` is the number of versions between the policy that sampled a token and the one that
    trains on it, mean over tokens.

    Args:
        rollout: the groups of a step.
        policy_version: the version of the policy that trains on it."""
    groups = rollout.groups + rollout.filtered_groups
    responses = all_responses(groups)
    rewards = [graded.reward for graded in responses if graded.is_graded] or [0.0]
    lengths = [len(graded.response.token_ids) for graded in responses]
    versions = sum(
        int(np.asarray(graded.response.policy_versions).sum(dtype=np.int64)) for graded in responses
    )
    means = {
        term: fmean([r.rewards[term] for r in responses if term not in r.ungraded_terms] or [0.0])
        for term in responses[0].rewards
    }
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "accuracy": means.pop(ACCURACY),
        **{f"{term}/mean": mean for term, mean in means.items()},
        "rewards/ungraded": fmean(not graded.is_graded for graded in responses),
        "response_length/mean": fmean(lengths),
        "response_length/max": max(lengths),
        "truncated": fmean(graded.is_truncated for graded in responses),
        "groups/zero_variance": fmean(group.has_equal_rewards for group in groups),
        "groups/filtered": len(rollout.filtered_groups),
        "policy_version": policy_version,
        "staleness": policy_version - versions / sum(lengths) if any(lengths) else 0.0,
        "response_tokens": sum(lengths),
        **episode_metrics([graded.episode for graded in responses if graded.episode]),
    }


def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Return means over episodes, and the share of each status; nothing without episodes.

    - `turns`: those of the policy.
    - `tokens`: tokens of all branches.
    - `forks`: branches after the first.
    - `versions`: versions of the policy in one episode."""
    if not episodes:
        return {}
    per_episode: dict[str, list[float]] = {
        "turns": [sum(turn.trained for turn in episode.turns) for episode in episodes],
        "tokens": [episode.num_tokens for episode in episodes],
        "sampled_tokens": [sum(b.num_sampled for b in episode.branches) for episode in episodes],
        "tool_calls": [episode.num_tool_calls for episode in episodes],
        "tool_errors": [episode.num_tool_errors for episode in episodes],
        "tool_seconds": [episode.tool_seconds for episode in episodes],
        "engine_seconds": [episode.engine_seconds for episode in episodes],
        "forks": [max(0, len(episode.branches) - 1) for episode in episodes],
        "versions": [
            len({v for b in episode.branches for v in b.policy_versions} - {-1})
            for episode in episodes
        ],
    }
    statuses: Counter[str] = Counter(episode.status for episode in episodes)
    return {f"episode/{name}": fmean(values) for name, values in per_episode.items()} | {
        f"episode/status/{status}": statuses[status] / len(episodes) for status in STATUSES
    }


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the mini-batches of a rollout; of a maximum, the
    maximum."""
    reductions = {name: max if name.endswith("/max") else fmean for name in updates[0]}
    return {
        name: reduce([update[name] for update in updates]) for name, reduce in reductions.items()
    }
