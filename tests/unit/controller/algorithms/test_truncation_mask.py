"""Responses that are cut off: trained on, or left out of everything but baselines."""

import math

import algorithm_formulae as formulae
import pytest
from algorithm_problem import check, plain, weighted_by_the_ratio, with_kl
from refusals import refused

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.config import parse_recipe
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections.truncation_mask import mask_truncated
from megatron_r1.controller.loop import outcome_advantages, split_into_minibatches
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

# Of each group of four: which are cut off. Of the third no graded one is left.
CUT = [[0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]
LEFT_OUT = {4 * group + place for group, own in enumerate(CUT) for place in range(4) if own[place]}


def response(reward, is_cut, is_graded=True, num_tokens=3):
    tokens = [1] * num_tokens
    sampled = Response(tokens, [0.0] * num_tokens, tokens, "length" if is_cut else "stop")
    return GradedResponse(sampled, "x", {"accuracy": reward}, reward, "", is_graded=is_graded)


def groups_of(rows):
    prompt = make_prompt("1 + 1?", "math", "2", {})
    return [Group(prompt, [1], [response(*each) for each in row]) for row in rows]


def mask(by_group):
    return mask_truncated(by_group, groups_of([[(0.0, cut) for cut in own] for own in CUT]))


def test_they_are_in_no_sum_and_no_denominator_and_count_in_the_baseline():
    masked = {"corrected": mask, "left_out": LEFT_OUT}
    check(
        *("grpo", {"kl_beta": 0.1}, formulae.group_relative, with_kl(10, 10, 0.1), "sequence"),
        **masked,
    )
    check(
        *("dapo", {}, formulae.group_relative, plain(0.2, 0.28), "token", (0.2, 0.28)),
        **masked,
    )
    check(
        *("reinforce", {}, formulae.less_the_rollouts_mean, weighted_by_the_ratio, "constant"),
        **masked,
    )

    def normalized(responses):
        """As PPO's and REINFORCE++'s: mean and deviation are of the tokens that are trained on."""
        kept = [o for i, o in enumerate(responses) if i not in LEFT_OUT]
        made = iter(formulae.reinforce_pp(kept, 0.01))
        none = formulae.same_for_all_tokens(responses, lambda o: 0.0)
        return [none[i] if i in LEFT_OUT else next(made) for i in range(len(responses))]

    check("reinforce_pp", {}, normalized, plain(0.2, 0.2), "token", (0.2, 0.2), **masked)


def test_the_setting_leaves_them_out_of_what_the_trainer_gets():
    rows = [[(1.0, False), (0.0, True), (0.0, False), (1.0, True, False)]]
    rl = {"algorithm": "dr_grpo", "group_size": 4, "prompts_per_rollout": 1, "minibatches": 2}
    groups, algorithm = groups_of(rows), algorithms.find_algorithm("dr_grpo")
    config, third = parse_recipe({"rl": rl}), 1 / 3
    trained = outcome_advantages(groups, algorithm, config, 1)
    assert trained[0] == pytest.approx([1 - third, -third, -third, math.nan], nan_ok=True)
    plain_ones = algorithm.outcome_advantages([[1.0, 0.0, 0.0, None]], config.rl)
    assert repr(trained) == repr(plain_ones), "the default changes no bit"
    masked = outcome_advantages(
        groups, algorithm, parse_recipe({"rl": {**rl, "truncated": "mask"}}), 1
    )
    assert masked[0] == pytest.approx([1 - third, math.nan, -third, math.nan], nan_ok=True)
    samples = training_samples(groups, masked)
    assert [each.is_trained for [each] in samples] == [True, False, True, False]
    assert [[s.is_trained for s in own] for own in split_into_minibatches(samples, 2)] == [
        [True, False]
    ] * 2


def test_too_few_responses_that_are_not_cut_off_stop_the_run():
    groups = groups_of([[(1.0, False), (0.0, True), (0.0, True), (0.0, True)]])
    config = parse_recipe({"rl": {"truncated": "mask", "algorithm": "dr_grpo"}})
    advantages = outcome_advantages(groups, algorithms.find_algorithm("dr_grpo"), config, 1)
    samples = training_samples(groups, advantages)
    with pytest.raises(RunError, match=r"1 of 4 .*rl.minibatches: 2.*rl.truncated"):
        split_into_minibatches(samples, 2)


def test_a_schedule_may_change_it():
    schedule = [{"from_step": 9, "rl.truncated": "mask"}]
    parts = dict(parse_recipe({"rl": {"schedule": schedule}}).schedule_parts())
    assert [part.rl.truncated for part in parts.values()] == ["train", "mask"]
    with refused("rl.truncated", Cause.UNKNOWN, "drop", "mask"):
        parse_recipe({"rl": {"truncated": "drop"}})
