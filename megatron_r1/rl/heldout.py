"""Accuracy on held-out questions: pass@1 as a mean over samples, and the majority's."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from statistics import fmean

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.estimators import estimate
from megatron_r1.evaluation.voting import majority_score
from megatron_r1.rewards.combine import ACCURACY
from megatron_r1.rl.sampling import Group, Rollouts, Sampling


async def evaluate(
    rollouts: Rollouts, prompts: list[Prompt], sampling: Sampling
) -> tuple[dict[str, float], list[Group]]:
    """Answer every prompt `sampling.num_samples` = N times with the present weights.

    eval/pass@1: mean accuracy over all samples (DeepSeek-R1, arXiv 2501.12948, section 3);
    eval/cons@N: share of questions whose majority answer is right (`voting.majority_score`);
    eval/TERM: mean of each other reward that is measured, such as format and language;
    eval/ungraded: share of the answers whose accuracy nobody could tell. What was not graded takes
    no part in a mean, and a question without a graded answer in none.
    interval/…/low, /high: their 95% intervals (`estimators.estimate`).

    Raises ValueError and RuntimeError as `Rollouts.check_grades`.
    """
    collected = await rollouts.collect(prompts, sampling)
    rollouts.check_grades(collected.groups)
    opened = rollouts.text.opens_thought
    votes, means = [], defaultdict(list)
    for group in collected.groups:
        for term in group.outputs[0].rewards:
            graded = [output for output in group.outputs if term not in output.ungraded]
            scores = [output.rewards[term] for output in graded]
            if scores:
                means[term].append(fmean(scores))
            if scores and term == ACCURACY:
                texts = [output.text for output in graded]
                kind = group.prompt.kind
                votes.append(majority_score(rollouts.pool, kind, texts, scores, opened))
    outputs = [output for group in collected.groups for output in group.outputs]
    right = means.pop(ACCURACY, [])
    scores = {term: estimate(means[term]) for term in sorted(means)}
    if right:
        consensus = estimate(await asyncio.gather(*votes))
        scores |= {"pass@1": estimate(right), f"cons@{sampling.num_samples}": consensus}
    metrics = {
        **{f"eval/{name}": score.value for name, score in scores.items()},
        "eval/response_length": fmean(len(output.completion.token_ids) for output in outputs),
        "time/eval": collected.rollout_seconds + collected.reward_seconds,
    }
    if any(ungraded := [ACCURACY in output.ungraded for output in outputs]):
        metrics["eval/ungraded"] = fmean(ungraded)
    for name, score in scores.items():
        if score.low is not None and score.high is not None:  # of a single question, there is none
            metrics |= {f"interval/{name}/low": score.low, f"interval/{name}/high": score.high}
    return metrics, collected.groups
