"""Evaluates the policy on held-out prompts: pass@1 as a mean over samples, and majority votes."""

import asyncio
from collections import defaultdict
from functools import partial
from statistics import fmean

from r1_grading.reading import Part
from r1_grading.remote.judge import compared_part
from r1_grading.rewards import ENVIRONMENT
from r1_grading.terms import ACCURACY, weights_at

from megatron_r1.config import Config, RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.metrics import episode_metrics
from megatron_r1.controller.rollouts.response_lines import response_lines
from megatron_r1.controller.rollouts.rollout import Group, RolloutSampling, all_responses
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.estimates import Estimate, estimate_mean
from megatron_r1.evaluation.voting import expects_number, majority_reward
from megatron_r1.evaluation.win_rates import length_difference, win_rates


class HeldoutEvaluation:
    """Evaluates the engines' weights on the held-out prompts of a run, and records the result.

    Args:
        config: the run's settings; `eval` says how often and with how many samples.
        collector: has the engines sample and the rewards grade.
        prompts: the held-out prompts; none: there is no evaluation.
        recorder: writes the metrics and the samples into the run's folder."""

    def __init__(
        self,
        config: Config,
        collector: RolloutCollector,
        prompts: list[Prompt],
        recorder: RunRecorder,
    ):
        self._config, self._recorder = config, recorder
        self._collector, self._prompts = collector, prompts

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step`: every `eval.every` steps, and after the last one."""
        interval = self._config.eval.every
        return step == self._config.run.steps or bool(interval and step % interval == 0)

    async def run(self, step: int) -> None:
        """Evaluate the policy after `step`, 0 for the base model's."""
        if not self._prompts:
            return
        self._recorder.view.show_phase("evaluation", f"{len(self._prompts)} held-out questions")
        settings = self._config.eval
        step_of_settings = max(1, step)  # the base model is evaluated as step 0
        config = self._config.at(step_of_settings)
        sampling = RolloutSampling(
            group_size=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_response_tokens=config.rollout.max_response_tokens,
            step=step_of_settings,
            reward_weights=weights_at(config.rewards.weights, step_of_settings),
            stop=tuple(config.rollout.stop),
        )
        metrics, groups = await evaluate_heldout(
            self._collector, self._prompts, sampling, config.rewards
        )
        records = response_lines(groups, step, "eval", None)
        self._recorder.record_evaluation({"step": step, **metrics}, records)


async def evaluate_heldout(
    collector: RolloutCollector,
    prompts: list[Prompt],
    sampling: RolloutSampling,
    rewards: RewardsConfig,
) -> tuple[dict[str, float], list[Group]]:
    """Sample `sampling.group_size` = N responses to every prompt; return metrics and groups.

    eval/pass@1: mean accuracy over all samples (DeepSeek-R1, arXiv 2501.12948, section 3);
    eval/cons@N: share of prompts whose majority answer is right (`voting.majority_reward`);
    eval/questions: prompts with a graded response;
    eval/TERM: mean of each other reward that is measured, such as format and language;
    eval/win_rate, eval/lc_win_rate: of questions of kind judge, where the judge compares
    (`evaluation.win_rates`);
    eval/ungraded: share of the responses whose accuracy could not be graded. Ungraded responses
    are excluded from all means; a prompt without graded responses is skipped.
    interval/…/low, /high: their 95% intervals (`estimates.estimate_mean`).

    Args:
        collector: samples and grades the responses.
        prompts: the held-out questions.
        sampling: N, the length limit and the temperature.
        rewards: the section `rewards`.

    Raises:
        UserError: one reward failed on every response.
        RunError: too large a share of the responses could not be graded."""
    rollout = await collector.collect(prompts, sampling)
    collector.check_grades(rollout.groups)
    estimates = await _compute_estimates(collector, rollout.groups, sampling.group_size, rewards)
    responses = all_responses(rollout.groups)
    metrics = {
        **{f"eval/{name}": mean.value for name, mean in estimates.items()},
        "eval/questions": sum(
            any(ACCURACY not in graded.ungraded_terms for graded in group.responses)
            for group in rollout.groups
        ),
        "eval/response_length": fmean(len(graded.response.token_ids) for graded in responses),
        "time/eval": rollout.rollout_seconds + rollout.reward_seconds,
    }
    episodes = episode_metrics([graded.episode for graded in responses if graded.episode])
    shown_metrics = ("episode/turns", "episode/tool_calls", "episode/tool_errors")
    metrics |= {
        f"eval/{name}": value
        for name, value in episodes.items()
        if name in shown_metrics or ("status" in name and value)
    }
    if any(are_ungraded := [ACCURACY in graded.ungraded_terms for graded in responses]):
        metrics["eval/ungraded"] = fmean(are_ungraded)
    for name, mean in estimates.items():
        if mean.low is not None and mean.high is not None:  # a single prompt has no interval
            metrics |= {f"interval/{name}/low": mean.low, f"interval/{name}/high": mean.high}
    return metrics, rollout.groups


async def _compute_estimates(
    collector: RolloutCollector, groups: list[Group], num_samples: int, rewards: RewardsConfig
) -> dict[str, Estimate]:
    """Return the estimate of each reward, of pass@1, cons@N and the win rates; see
    `evaluate_heldout`."""
    votes, means, thought_opened = [], defaultdict(list), collector.tokenizer.opens_thought
    for group in groups:
        for term in group.responses[0].rewards:
            graded_responses = [
                response for response in group.responses if term not in response.ungraded_terms
            ]
            term_rewards = [response.rewards[term] for response in graded_responses]
            if term_rewards:
                means[term].append(fmean(term_rewards))
            if term_rewards and term == ACCURACY and group.prompt.kind != ENVIRONMENT:
                texts = [response.text for response in graded_responses]
                vote = partial(
                    majority_reward, collector.pool, group.prompt.kind, texts, term_rewards
                )
                votes.append(
                    vote(
                        thought_opened,
                        rewards.reading,
                        truth_is_number=expects_number(group.prompt),
                    )
                )
    accuracies = means.pop(ACCURACY, [])
    estimates: dict[str, Estimate] = {term: estimate_mean(means[term]) for term in sorted(means)}
    if accuracies:
        estimates["pass@1"] = estimate_mean(accuracies)
    if votes:
        estimates[f"cons@{num_samples}"] = estimate_mean(await asyncio.gather(*votes))
    part = compared_part(rewards.options.get("judge", {}))
    samples_by_group = [
        _compare_with_reference(group, thought_opened, part) for group in groups if part
    ]
    if any(samples_by_group):
        estimates |= win_rates([samples for samples in samples_by_group if samples], seed=0)
    return estimates


def _compare_with_reference(
    group: Group, thought_opened: bool, part: Part
) -> list[tuple[float, int]]:
    """Return (preference, difference of lengths) of the group's graded responses, if it is of the
    kind judge."""
    if group.prompt.kind != "judge":
        return []
    reference = str(group.prompt.truth)
    return [
        (
            response.rewards[ACCURACY],
            length_difference(response.text, thought_opened, reference, part),
        )
        for response in group.responses
        if ACCURACY not in response.ungraded_terms
    ]
