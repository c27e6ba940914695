"""What a user gets wrong: one clear message, quickly, and an exit status that is not 0."""

import json

import pytest
from command_line import run


def recipe(base, folder, **changes) -> str:
    text = (base / "rl.yaml").read_text().replace(f"{base}/rl,", f"{folder}/run,")
    for old, new in changes.items():
        text += f"\n{old}: {json.dumps(new)}" if old not in text else ""
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        (["--rl.group_sise", "4"], 2, "unknown key rl.group_sise; did you mean rl.group_size?"),
        (["--model.path", "/nowhere"], 2, "/nowhere"),
        (["--data.path", "/nowhere.jsonl"], 2, "/nowhere.jsonl"),
        (["--parallel.tensor", "3", "--parallel.processes", "3"], 2, "num_attention_heads"),
        (["--parallel.processes", "3", "--parallel.pipeline", "2"], 2, "3 trainer ranks cannot"),
        (["--rollout.max_response_tokens", "999"], 2, "leaves no room for a prompt within 256"),
        (
            ["--rollout.placement", "hosts", "--rollout.hosts_address", "nowhere.invalid"],
            2,
            "rollout.hosts_address: nowhere.invalid has no address",
        ),
        (["--rollout.engines", "100000"], 2, "rollout.engines=100000: 100,000 processes of vLLM"),
        (["--rollout.kv_cache_gib", "4000"], 2, "rollout.kv_cache_gib=4000: each engine process"),
    ],
    ids=["key", "model", "data", "tensor size", "ranks", "length", "address", "engines", "cache"],
)
def test_a_wrong_setting_is_one_message(base, tmp_path, settings, status, message):
    done = run("rl", recipe(base, tmp_path), *settings, timeout_seconds=120)
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_model_of_another_architecture_is_refused_by_name(base, tmp_path):
    config = json.loads((base / "base/hf/config.json").read_text())
    (tmp_path / "other").mkdir()
    config["architectures"] = ["MambaForCausalLM"]
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    done = run("rl", recipe(base, tmp_path), "--model.path", tmp_path / "other")
    assert done.returncode == 2 and "MambaForCausalLM" in done.stderr


def test_a_model_without_weights_is_refused_before_anything_starts(base, tmp_path):
    done = run("rl", recipe(base, tmp_path), "--model.path", base / "model")
    assert done.returncode == 2, done.stderr
    assert f"model.path: {base}/model has neither model.safetensors nor" in done.stderr
    assert list((tmp_path / "run").rglob("*.log")) == []


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(base, tmp_path):
    sft = base / "sft.yaml"
    first = run("sft", sft, "--run.folder", tmp_path / "run", "--run.steps", "1")
    assert first.returncode == 0, first.stderr
    other = run("sft", sft, "--run.folder", tmp_path / "run", "--model.init_std", "0.2")
    assert other.returncode == 2 and "model.init_std" in other.stderr
    # The same settings, but the folder they name holds another model now.
    config = base / "model/config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(before), "moe_intermediate_size": 48}))
        done = run("sft", sft, "--run.folder", tmp_path / "run", "--run.steps", "2")
    finally:
        config.write_text(before)
    assert done.returncode != 0 and "does not fit this model" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_cannot_start_is_one_message(base, tmp_path):
    done = run("rl", recipe(base, tmp_path), "--rollout.start_timeout_seconds", "0.5")
    assert done.returncode == 1
    assert "engine-0" in done.stderr and "Traceback" not in done.stderr


def test_sft_has_no_critic_to_train(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--rl.algorithm", "ppo"]
    done = run("sft", base / "sft.yaml", *settings)
    assert done.returncode == 2 and "rl.algorithm: ppo has a critic" in done.stderr


def test_a_run_that_diverges_stops_before_it_saves_what_is_lost(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--optimizer.learning_rate", "1.0e+30"]
    done = run("sft", base / "sft.yaml", *settings)
    assert done.returncode == 1 and "lower optimizer.learning_rate" in done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{len(lines):08d}"
