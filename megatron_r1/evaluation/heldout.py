"""Accuracy on held-out questions: pass@1 as a mean over samples, and the majority's."""

from __future__ import annotations

import asyncio
from statistics import fmean

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.estimators import estimate
from megatron_r1.evaluation.voting import majority_score
from megatron_r1.rollout.sampling import Group, Rollouts, Sampling


async def evaluate(
    rollouts: Rollouts, prompts: list[Prompt], sampling: Sampling
) -> tuple[dict[str, float], list[Group]]:
    """Answer every prompt `sampling.num_samples` = N times with the present weights.

    eval/pass@1: mean accuracy over all samples (DeepSeek-R1, arXiv 2501.12948, section 3);
    eval/cons@N: share of questions whose majority answer is right (`voting.majority_score`);
    eval/TERM: mean of each other reward that is measured, such as format and language.
    interval/…/low, /high: their 95% intervals (`estimators.estimate`).
    """
    collected = await rollouts.collect(prompts, sampling)
    opened = rollouts.text.opens_thought
    right, votes, lengths = [], [], []
    terms: dict[str, list[float]] = {}
    for group in collected.groups:
        scores = [output.rewards["accuracy"] for output in group.outputs]
        texts = [output.text for output in group.outputs]
        right.append(fmean(scores))
        votes.append(majority_score(rollouts.pool, group.prompt.kind, texts, scores, opened))
        lengths += [len(output.completion.token_ids) for output in group.outputs]
        for term in group.outputs[0].rewards.keys() - {"accuracy"}:
            mean = fmean(output.rewards[term] for output in group.outputs)
            terms.setdefault(term, []).append(mean)
    scores = {
        "pass@1": estimate(right),
        f"cons@{sampling.num_samples}": estimate(await asyncio.gather(*votes)),
        **{term: estimate(terms[term]) for term in sorted(terms)},
    }
    metrics = {
        **{f"eval/{name}": score.value for name, score in scores.items()},
        "eval/response_length": fmean(lengths),
        "time/eval": collected.rollout_seconds + collected.reward_seconds,
    }
    for name, score in scores.items():
        if score.low is not None and score.high is not None:  # of a single question, there is none
            metrics |= {f"interval/{name}/low": score.low, f"interval/{name}/high": score.high}
    return metrics, collected.groups
