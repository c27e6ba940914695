"""The most tokens that a prompt and its response may have in an engine."""

import json

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config.recipe_files import from_overrides
from megatron_r1.engines.server.model_config import max_model_len


@pytest.fixture
def model(tmp_path):
    """A model of 64 positions."""
    content = {"model_type": "qwen2", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return {"model.path": str(tmp_path)}


def test_a_response_leaves_room_for_one_token_of_a_prompt_at_least(model):
    assert max_model_len(from_overrides(model | {"rollout.max_response_tokens": 63})) == 64
    with refused("rollout.max_response_tokens", Cause.TOO_LARGE, 64):
        max_model_len(from_overrides(model | {"rollout.max_response_tokens": 64}))


def test_no_engine_is_longer_than_its_model(model):
    settings = model | {"rollout.max_response_tokens": 8}
    assert max_model_len(from_overrides(settings | {"rollout.max_model_len": 64})) == 64
    with refused("rollout.max_model_len", Cause.TOO_LARGE, 65, 64):
        max_model_len(from_overrides(settings | {"rollout.max_model_len": 65}))
