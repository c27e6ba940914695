"""Runs that train adapters: what engines, checkpoints and exports hold of them."""

import json
from pathlib import Path

import pytest
from command_line import run
from safetensors.torch import load_file

RANK, ALPHA = 4, 64.0
LORA = ["--model.lora.rank", str(RANK), "--model.lora.alpha", str(ALPHA)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


SERVED = ["--push.adapter_only", "true", "--model.lora.targets"]
SERVED += ["[q_b_proj, o_proj, mlp.gate_proj, mlp.down_proj, shared_experts.up_proj]"]


def assert_merged(folder: Path, base: Path, most: int = 20) -> None:
    """hf/ is the base model plus the product of the factors in adapter/."""
    merged, start = (load_file(at / "model.safetensors") for at in (folder / "hf", base))
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    adapted = 0
    for name, weight in start.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            a, b = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
            weight = weight + ALPHA / RANK * b @ a
            adapted += b.abs().max() > 0
        assert (merged[name] - weight).abs().max() < 1e-6, name
    assert adapted == len(factors) / 2 > most


@pytest.mark.more
def test_adapters_reach_the_engine_and_survive_another_layout(base):
    folder, start = base / "lora_rl", base / "base" / "hf"
    recipe = [base / "rl.yaml", "--run.folder", folder, *LORA]
    experts = ["--parallel.tensor", "2", "--parallel.expert", "2", "--parallel.expert_tensor", "1"]
    first = run("rl", *recipe, "--run.steps", "2", "--parallel.processes", "2", *experts)
    assert first.returncode == 0, first.stdout + first.stderr
    stages = ["--parallel.processes", "2", "--parallel.pipeline", "2"]
    then = run("rl", *recipe, "--run.steps", "3", *stages)
    assert then.returncode == 0, then.stdout + then.stderr
    assert "another parallel layout" in then.stdout + then.stderr
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    # As without adapters (test_rl_run.py): fp32, merged in the engine and apart in the trainer.
    assert max(line["logprob_diff/mean"] for line in metrics) < 1e-5
    assert max(line["logprob_diff/max"] for line in metrics) < 1e-4
    assert metrics[-1]["kl"] > 1e-4
    assert_merged(folder, start)
    whole = (start / "model.safetensors").stat().st_size
    stored = sum(path.stat().st_size for path in folder.glob("checkpoints/step_*3/*.distcp"))
    assert stored < whole, "weights, reference and two moments of whole weights were 4 times that"


@pytest.mark.more
def test_adapters_alone_reach_the_engine_from_tensor_ranks_and_stages(base):
    folder, start = base / "adapter_rl", base / "base" / "hf"
    recipe = [base / "rl.yaml", "--run.folder", folder, *LORA, *SERVED]
    two = ["--parallel.processes", "2"]
    first = run("rl", *recipe, "--run.steps", "2", *two, "--parallel.tensor", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    then = run("rl", *recipe, "--run.steps", "3", *two, "--parallel.pipeline", "2")
    assert then.returncode == 0, then.stdout + then.stderr
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    # As with merged weights.
    assert max(line["logprob_diff/mean"] for line in metrics) < 1e-5
    assert max(line["logprob_diff/max"] for line in metrics) < 1e-4
    assert max(line["push/probe_diff"] for line in metrics) < 1e-5
    assert metrics[-1]["kl"] > 1e-4
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    num_bytes = sum(factor.nbytes for factor in factors.values())
    assert {line["push/bytes"] for line in metrics} == {num_bytes}
    assert_merged(folder, start, most=6)


@pytest.mark.slow  # the two above train them by RL
def test_sft_trains_adapters(base):
    folder, start = base / "lora_sft", base / "base" / "hf"
    settings = ["--model.path", start, "--model.init", "load", "--run.steps", "8"]
    done = run("sft", base / "sft.yaml", "--run.folder", folder, *settings, *LORA)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in lines(folder / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0], losses
    assert_merged(folder, start)
