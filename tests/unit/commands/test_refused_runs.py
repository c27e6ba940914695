"""What a user gets wrong in a recipe of `rl` and `sft`: refused before anything starts."""

import json
import shutil

import pytest
import yaml
from refusals import refused
from small_qwen2 import MODEL

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.rehearse.model import write_random_model_folder

HF = {**MODEL, "vocab_size": 512, "eos_token_id": 1, "bos_token_id": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Qwen2 of two layers with weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("refused") / "model"
    write_random_model_folder(folder, HF, seed=0)
    return folder


@pytest.fixture
def recipe(model, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "truth": 2}\n')
    tree = {
        "run": {"folder": str(tmp_path / "run"), "steps": 1},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "path": str(tmp_path / "q.jsonl"),
            "heldout_fraction": 0,
            "template": "{question}",
        },
        "rollout": {"max_response_tokens": 8, "dtype": "float32"},
        "rl": {"prompts_per_rollout": 4, "group_size": 4, "minibatches": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("settings", "key", "cause", "shown"),
    [
        ({"rl.group_sise": 4}, "rl.group_sise", Cause.UNKNOWN, "rl.group_size"),
        ({"model.path": "/nowhere"}, "model.path", Cause.NOT_FOUND, "/nowhere"),
        ({"data.path": "/nowhere.jsonl"}, "data.path", Cause.NOT_FOUND, "/nowhere.jsonl"),
        (
            *({"parallel.tensor": 3, "parallel.processes": 3}, "parallel.tensor"),
            *(Cause.INDIVISIBLE, "num_attention_heads"),
        ),
        (
            *({"parallel.processes": 3, "parallel.pipeline": 2}, "parallel"),
            *(Cause.INDIVISIBLE, 3),
        ),
        (
            *({"rollout.max_response_tokens": 999}, "rollout.max_response_tokens"),
            *(Cause.TOO_LARGE, 999),
        ),
        (
            {"rollout.placement": "hosts", "rollout.hosts_address": "nowhere.invalid"},
            *("rollout.hosts_address", Cause.NOT_FOUND, "nowhere.invalid"),
        ),
        ({"rollout.engines": 100_000}, "rollout.engines", Cause.TOO_LARGE, "100,000"),
        ({"rollout.kv_cache_gib": 4000}, "rollout.kv_cache_gib", Cause.TOO_LARGE, 4000),
    ],
)
def test_a_wrong_setting_is_refused(recipe, tmp_path, settings, key, cause, shown):
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    with refused(key, cause, shown):
        cli._dispatch_command(["rl", str(recipe), *options])
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_supported_is_refused(recipe, tmp_path):
    (tmp_path / "other").mkdir()
    hf_config = HF | {"architectures": ["MambaForCausalLM"]}
    (tmp_path / "other/config.json").write_text(json.dumps(hf_config))
    with refused("architectures", Cause.UNSUPPORTED, "MambaForCausalLM"):
        cli._dispatch_command(["rl", str(recipe), "--model.path", str(tmp_path / "other")])


def test_a_model_without_weights_is_refused(recipe, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("*.safetensors"))
    with refused("model.path", Cause.NOT_FOUND, other):
        cli._dispatch_command(["rl", str(recipe), "--model.path", str(other)])
    assert not list((tmp_path / "run").rglob("*.log"))


def test_sft_has_no_critic_to_train(recipe):
    with refused("rl.algorithm", Cause.CONFLICT, "ppo"):
        cli._dispatch_command(
            ["sft", str(recipe), "--sft.data", "sft.jsonl", "--rl.algorithm", "ppo"]
        )
