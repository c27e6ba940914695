"""What is sampled: cuts, temperatures, stop strings."""

import math

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.rl_checks import check_sampling
from megatron_r1.config import Config, parse_recipe


@pytest.mark.parametrize("rl", [{}, {"importance_cap": 2.0}, {"algorithm": "rloo"}])
@pytest.mark.parametrize("top_p", [0.8, 0.95, 0.1])
def test_b15_a_cut_without_its_kept_tokens_is_refused_with_the_size_of_its_error(top_p, rl):
    largest = f"{-math.log(top_p):.2g}"  # the share that is left is at least top_p
    with refused("rollout.top_p", Cause.MISSING, f"{top_p:g}", largest, "rollout.top_k"):
        check_sampling(Config(rollout={"top_p": top_p}, rl=rl))
    later = {**rl, "schedule": [{"from_step": 3, "rollout.top_p": top_p}]}
    with refused("rollout.top_p", Cause.CONFLICT, "from_step 3"):
        check_sampling(Config(rl=later))
    check_sampling(Config(rollout={"top_p": top_p, "top_k": 64}, rl=rl))
    check_sampling(Config(rollout={"top_k": 64}, rl=later))
    check_sampling(Config(rl=rl, eval={"top_p": top_p}))


def test_b15_min_p_needs_a_top_k_too_and_no_drafts():
    with refused("rollout.min_p", Cause.MISSING, 0.1, "rollout.top_k"):
        check_sampling(Config(rollout={"min_p": 0.1}))
    check_sampling(Config(rollout={"min_p": 0.1, "top_k": 64}))
    drafts = {"speculative": {"method": "ngram"}}
    with refused("rollout.min_p", Cause.CONFLICT, "rollout.speculative"):
        check_sampling(Config(rollout={"min_p": 0.1, "top_k": 64, **drafts}))
    check_sampling(Config(rollout={"top_p": 0.9, "top_k": 64, **drafts}))


@pytest.mark.parametrize("cut", ["typical_p", "top_a"])
def test_b15_other_cuts_are_no_settings(cut):
    with refused(f"rollout.{cut}", Cause.UNKNOWN):
        parse_recipe({"rollout": {cut: 0.1}})


@pytest.mark.parametrize("temperature", [0, 0.0, -1, math.inf, math.nan])
def test_b16_temperature_0_is_refused_where_log_probabilities_are_needed(temperature):
    with refused("rollout.temperature", Cause.OUT_OF_RANGE):
        parse_recipe({"rollout": {"temperature": temperature}})
