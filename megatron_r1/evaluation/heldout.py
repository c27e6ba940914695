"""Accuracy on held-out questions: pass@1 as a mean over samples, and the majority's."""

from __future__ import annotations

from statistics import fmean

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.voting import majority
from megatron_r1.rollout.sampling import Group, Rollouts, Sampling


async def evaluate(
    rollouts: Rollouts, prompts: list[Prompt], sampling: Sampling
) -> tuple[dict[str, float], list[Group]]:
    """Answer every prompt `sampling.num_samples` = N times with the present weights.

    eval/pass@1: mean accuracy over all samples (DeepSeek-R1, arXiv 2501.12948, section 3);
    eval/cons@N: share of questions whose majority answer is right.
    """
    collected = await rollouts.collect(prompts, sampling)
    right, voted, lengths, forms = [], [], [], []
    for group in collected.groups:
        scores = [output.rewards["accuracy"] for output in group.outputs]
        chosen = majority([output.text for output in group.outputs])
        right.append(fmean(scores))
        voted.append(0.0 if chosen is None else scores[chosen])
        lengths += [len(output.completion.token_ids) for output in group.outputs]
        forms += [output.rewards["format"] for output in group.outputs]
    metrics = {
        "eval/pass@1": fmean(right),
        f"eval/cons@{sampling.num_samples}": fmean(voted),
        "eval/format": fmean(forms),
        "eval/response_length": fmean(lengths),
        "time/eval": collected.rollout_seconds + collected.reward_seconds,
    }
    return metrics, collected.groups
