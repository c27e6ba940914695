"""The lines of samples.jsonl."""

from typing import Any

from megatron_r1.controller.rollouts.rollout import Group


def response_lines(
    groups: list[Group], step: int, split: str, limit: int | None
) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl: the first response of every group before the second of any,
    or, without a limit, every response of all groups.

    Args:
        groups: the graded responses of each prompt.
        step: the training step, from 1.
        split: the split of the prompts, as it is recorded.
        limit: the most lines; None: no limit."""
    responses = [
        (index, group, graded) for group in groups for index, graded in enumerate(group.responses)
    ]
    if limit is not None:
        responses = sorted(responses, key=lambda response: response[0])[:limit]
    return [
        {
            "step": step,
            "split": split,
            "id": group.prompt.id,
            "question": group.prompt.question,
            "truth": group.prompt.truth,
            "response": graded.text,
            "reward": graded.reward,
            "rewards": graded.rewards,
            "reason": graded.reason,
            "length": len(graded.response.token_ids),
            "policy_version": (graded.response.policy_versions or [None])[-1],
            **(graded.episode.record() if graded.episode else {}),
        }
        for _, group, graded in responses
    ]
