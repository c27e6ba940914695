"""What a recipe sets of an engine's cache, as vLLM's arguments."""

import json
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_that_return_kept_tokens_run_vllms_second_runner_on_a_gpu(device):
    settings = EngineSettings(device=device, return_sampling_mask=True)
    assert "--return-sampling-mask" in settings.arguments(Path("model"))
    runner = settings.environment().get("VLLM_USE_V2_MODEL_RUNNER")
    assert runner == ("1" if device == "cuda" else None)
    assert "--return-sampling-mask" not in arguments()
