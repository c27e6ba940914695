"""Refusals of speculative decoding before an engine starts, and vLLM's own setting."""

import json
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.engines.server import recipe_checks
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.settings import EngineSettings
from megatron_r1.push.matching.recipe_plan import check_drafter

MTP = {"num_attention_heads": 4, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}


def config(method, tokens=1, **sections):
    return parse_recipe(
        {"rollout": {"speculative": {"method": method, "tokens": tokens}}, **sections}
    )


@pytest.mark.parametrize(
    ("method", "tokens", "layers", "setting", "cause"),
    [
        ("mtp", 1, 0, "method", Cause.CONFLICT),
        ("mtp", 3, 2, "tokens", Cause.INDIVISIBLE),
        ("suffix", 8, 1, "method", Cause.NOT_INSTALLED),
    ],
)
def test_what_cannot_draft_is_refused(monkeypatch, method, tokens, layers, setting, cause):
    monkeypatch.setattr(recipe_checks, "find_spec", lambda name: None)
    with refused(f"rollout.speculative.{setting}", cause):
        recipe_checks.check_engines(
            config(method, tokens), MTP | {"num_nextn_predict_layers": layers}
        )


@pytest.mark.parametrize(
    ("method", "tokens", "layers"),
    [("none", 1, 0), ("ngram", 8, 0), ("mtp", 1, 1), ("mtp", 3, 1), ("mtp", 1, 2), ("mtp", 4, 2)],
)
def test_what_can_draft_is_not(method, tokens, layers):
    hf_config = MTP | {"num_nextn_predict_layers": layers}
    recipe_checks.check_engines(config(method, tokens), hf_config)


def test_a_drafter_behind_stages_is_refused():
    staged = parse_recipe({"rollout": {"speculative": {"method": "mtp"}, "pipeline_parallel": 2}})
    with refused(
        "rollout.speculative.method", Cause.UNSUPPORTED, "rollout.pipeline_parallel=2", "ngram"
    ):
        recipe_checks.check_engines(staged, MTP)


def test_suffix_is_taken_with_its_package_and_where_engines_are_elsewhere(monkeypatch):
    monkeypatch.setattr(recipe_checks, "find_spec", lambda name: name)
    recipe_checks.check_engines(config("suffix"), MTP)
    monkeypatch.setattr(recipe_checks, "find_spec", lambda name: None)
    hosts = parse_recipe({"rollout": {"speculative": {"method": "suffix"}, "placement": "hosts"}})
    recipe_checks.check_engines(hosts, MTP)


def test_a_drafter_without_trained_weights_is_refused():
    with refused("rollout.speculative.method", Cause.CONFLICT, "model.mtp"):
        check_drafter(config("mtp", model={"mtp": "none"}))
    check_drafter(config("ngram", model={"mtp": "none"}))
    check_drafter(config("mtp", model={"mtp": "frozen"}))


@pytest.mark.parametrize("method", ["none", "ngram", "mtp"])
def test_vllm_gets_its_own_setting_and_counts_drafts(method):
    settings = EngineSettings(**engine_settings(config(method, 2).rollout))
    arguments = settings.arguments(Path("model"))
    assert ("--disable-log-stats" in arguments) == (method == "none")
    if method == "none":
        assert "--speculative-config" not in arguments
    else:
        given = json.loads(arguments[arguments.index("--speculative-config") + 1])
        assert given == {"method": method, "num_speculative_tokens": 2}


def test_a_teacher_does_not_draft():
    assert "speculative" not in engine_settings(config("mtp").teacher)


def test_a_mistake_names_the_key():
    with refused("rollout.speculative.method", Cause.UNKNOWN):
        config("eagle")
    with refused("rollout.speculative.tokens", Cause.OUT_OF_RANGE):
        config("ngram", 0)
