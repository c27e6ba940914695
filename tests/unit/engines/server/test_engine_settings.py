"""What a recipe sets of an engine's cache, as vLLM's arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_toolkit import write_toolkit
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.engines.server import environment_variables
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.settings import EngineSettings


def arguments(**rollout) -> list[str]:
    config = parse_recipe({"rollout": rollout})
    return EngineSettings(**engine_settings(config.rollout)).arguments(Path("model"))


def test_the_blocks_of_the_cache_are_vllms_unless_set():
    assert "--block-size" not in arguments()
    made = arguments(kv_block_tokens=64)
    assert made[made.index("--block-size") + 1] == "64"
    with refused("rollout.kv_block_tokens", Cause.MALFORMED, 32):
        arguments(kv_block_tokens=48)


def test_engines_that_sleep_exchange_experts_through_the_host():
    """nixl, which vLLM would take, registers memory that a sleep gives away."""
    for given, sleeps, expected in (
        ({}, True, "torch_gloo"),
        ({}, False, None),
        ({"communicator": "pynccl"}, True, "pynccl"),
    ):
        settings = EngineSettings(
            redundant_experts=2, enable_sleep_mode=sleeps, vllm={"eplb_config": given}
        )
        made = settings.arguments(Path("model"))
        balancer = json.loads(made[made.index("--eplb-config") + 1])
        assert balancer.get("communicator") == expected, given


@pytest.mark.parametrize(("scale_format", "value"), [(None, "0"), ("ue8m0", "1")])
def test_vllm_keeps_the_scales_of_pushed_fp8_blocks(scale_format, value, monkeypatch):
    hf_config = {"quantization_config": {"scale_fmt": scale_format}}
    name = "VLLM_USE_DEEP_GEMM_E8M0"
    assert environment_variables.fp8_scale_environment(hf_config) == {name: value}
    for given in (None, value):
        monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
        environment_variables.check_fp8_scales(hf_config)
    other = str(1 - int(value))
    monkeypatch.setenv(name, other)
    with refused("push.fp8", Cause.CONFLICT, f"{name}={other}"):
        environment_variables.check_fp8_scales(hf_config)


DRAFT = """
import numpy, torch
from vllm.v1.spec_decode.ngram_proposer import batch_propose_numba
rows = numpy.zeros((4, 8), numpy.int32)
counts = numpy.full(4, 8, numpy.int32)
batch_propose_numba([0, 1, 2, 3], counts, rows, 2, 2, 16, 2, rows.copy(), counts.copy())
print(torch.get_num_threads())
"""


@pytest.mark.more  # Numba compiles
def test_drafting_leaves_an_engine_its_threads():
    env = os.environ | environment_variables.engine_environment("cpu", 1, 1)
    assert subprocess.check_output([sys.executable, "-c", DRAFT], env=env, text=True) == "1\n"


def test_engines_compile_with_the_installed_toolkit_unless_one_is_set(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment_variables.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(environment_variables, "SYSTEM_TOOLKIT", str(tmp_path / "system"))
    monkeypatch.setattr(environment_variables.shutil, "which", lambda name, path: None)
    assert environment_variables.compiler_environment() == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    half = write_toolkit(tmp_path / "usr", "13.0", None)
    monkeypatch.setattr(
        environment_variables.shutil, "which", lambda name, path: f"{half}/bin/nvcc"
    )
    with refused("CUDA_HOME", Cause.CONFLICT, half, "cuda_runtime_api.h"):
        environment_variables.compiler_environment()
    system = write_toolkit(tmp_path / "system")
    assert environment_variables.compiler_environment()["CUDA_HOME"] == str(system)
    # As conda's.
    (system / "targets" / "x86_64-linux").mkdir(parents=True)
    (system / "include").rename(system / "targets" / "x86_64-linux" / "include")
    assert environment_variables.compiler_environment()["CUDA_HOME"] == str(system)
    installed = write_toolkit(tmp_path / "cuda")
    made = EngineSettings(device="cuda").environment()
    assert made["CUDA_HOME"] == str(installed)
    # ninja is where this Python is.
    assert made["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    monkeypatch.setenv("CUDA_HOME", str(write_toolkit(tmp_path / "other", "12.9", 12090)))
    assert environment_variables.compiler_environment()["CUDA_HOME"] == f"{tmp_path}/other"


@pytest.mark.parametrize(
    ("nvcc", "headers", "shown"),
    [(None, 13000, "bin/nvcc"), ("13.5", 13000, "CUDA 13.5"), ("12.8", 12090, "headers of 12.9")],
)
def test_a_toolkit_that_cannot_compile_is_refused(nvcc, headers, shown, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(write_toolkit(tmp_path, nvcc, headers)))
    with refused("CUDA_HOME", Cause.CONFLICT, tmp_path, shown):
        EngineSettings(device="cuda").environment()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_that_return_kept_tokens_run_vllms_second_runner_on_a_gpu(device):
    settings = EngineSettings(device=device, return_sampling_mask=True)
    assert "--return-sampling-mask" in settings.arguments(Path("model"))
    runner = settings.environment().get("VLLM_USE_V2_MODEL_RUNNER")
    assert runner == ("1" if device == "cuda" else None)
    assert "--return-sampling-mask" not in arguments()
