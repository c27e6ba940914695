"""Shared prompts are refused by name with what does not know them."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.models.parallel_checks import check_shared_prompts


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "a model"),
        ({"parallel": {"context": 2}}, "parallel.context: 2"),
        ({"rl": {"routing_replay": True}}, "rl.routing_replay"),
        ({"model": {"mtp": "train"}}, "model.mtp: train"),
        ({"model": {"expert_bias_update_rate": 0.1}}, "model.expert_bias_update_rate"),
    ],
)
def test_shared_prompts_are_refused_where_something_does_not_know_them(settings, says):
    parallel = {"share_prompts": True, **settings.get("parallel", {})}
    check_shared_prompts(Config(parallel={"share_prompts": True}), is_plain=True)
    config = Config.model_validate({**settings, "parallel": parallel})
    with refused("parallel.share_prompts", Cause.CONFLICT, says):
        check_shared_prompts(config, is_plain=says != "a model")
