"""The trainer with Transformer Engine's modules on up to four null GPUs, against the CPU's path."""

import json
import shutil
from pathlib import Path

import pytest
from nullgpu.conftest import HERE, IMPORTS, TORCHRUN
from nullgpu.random_weights import write_random
from ranks import run_script
from small_models import MODELS
from trainer_reports import assert_same

from megatron_r1.base.processes.children import free_port, rank_variables

PARALLEL = HERE.parent / "parallel"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """DeepSeek-V3's architecture, with an MTP layer."""
    return write_random(tmp_path_factory.mktemp("models") / "model", MODELS["deepseek-yarn-mtp"])


@pytest.fixture(scope="module")
def on_cpu(model, tmp_path_factory) -> Path:
    """What one process reports that computes with our layers, without a GPU."""
    out = tmp_path_factory.mktemp("on_cpu")
    variables = rank_variables(0, 1, free_port("127.0.0.1"))
    variables |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(IMPORTS)}
    run_script(PARALLEL, ["trainer_steps.py", str(model), str(out), "one"], **variables)
    return out


@pytest.fixture(scope="module")
def on_one_gpu(on_null_gpu, model, tmp_path_factory) -> Path:
    """The same of one null GPU, with a checkpoint."""
    out = tmp_path_factory.mktemp("on_one_gpu")
    on_null_gpu(*TORCHRUN, "trainer_on_null_gpu.py", str(model), str(out), "one")
    return out


def test_transformer_engines_modules_compute_what_ours_do(model, on_cpu, on_one_gpu):
    expected = json.loads((on_cpu / "one.json").read_text())
    assert expected["next rollout"]["kl"] > 1e-3, "the reference has to differ from the policy here"
    assert_same(model, on_cpu / "one", on_one_gpu, "one", continued=False)


@pytest.mark.parametrize(
    ("gpus", "grids"),
    [
        (2, ["dp2", "tp2", "pp2", "ep2", "cp2", "pp2xvp2"]),
        (4, ["tp2xpp2", "tp2xep2", "pp2xvp2xcp2"]),
    ],
)
def test_every_split_does_too_and_continues_from_anothers_checkpoint(
    on_null_gpu, model, on_cpu, on_one_gpu, tmp_path, gpus, grids
):
    shutil.copytree(on_one_gpu / "checkpoint_one", tmp_path / "checkpoint")
    script = ["trainer_on_null_gpu.py", str(model), str(tmp_path), *grids]
    on_null_gpu(*TORCHRUN, f"--nproc-per-node={gpus}", *script, gpus=gpus)
    for grid in grids:
        assert_same(model, on_cpu / "one", tmp_path, grid)


def test_shared_prompts_and_turns_by_transformer_engines_attention(on_null_gpu, tmp_path):
    """Against its attention to each sample's own prompt."""
    names = ("qwen-untied", "deepseek-yarn-mtp")
    for name in names:
        write_random(tmp_path / name, MODELS[name])
    output = on_null_gpu(*TORCHRUN, "shared_on_null_gpu.py", str(tmp_path), "one", *names)
    assert all(f"{name} one: " in output for name in names), output[-3000:]


@pytest.mark.parametrize("exact_scales", ["0", "1"])
def test_products_of_fp8_blocks_are_those_of_the_emulation(on_null_gpu, exact_scales):
    """Of experts with and without tokens: rounded operands, from Transformer Engine's storage."""
    settings = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": exact_scales, "TORCHDYNAMO_DISABLE": "1"}
    printed = on_null_gpu("blockwise_layers.py", **settings).splitlines()[-1]
    apart, rounding = (float(part.split()[1]) for part in printed.split(", "))
    assert apart < 1e-6 < 0.01 < rounding < 0.1, printed
