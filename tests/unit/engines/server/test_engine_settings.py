"""What a recipe sets of an engine's cache, as vLLM's arguments."""

from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse
from megatron_r1.engines.server.settings import EngineSettings, engine_settings


def arguments(**rollout) -> list[str]:
    config = parse({"rollout": rollout})
    return EngineSettings(**engine_settings(config.rollout)).arguments(Path("model"))


def test_the_blocks_of_the_cache_are_vllms_unless_set():
    assert "--block-size" not in arguments()
    made = arguments(kv_block_tokens=64)
    assert made[made.index("--block-size") + 1] == "64"
    with refused("rollout.kv_block_tokens", Cause.MALFORMED, 32):
        arguments(kv_block_tokens=48)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_that_return_kept_tokens_run_vllms_second_runner_on_a_gpu(device):
    settings = EngineSettings(device=device, return_sampling_mask=True)
    assert "--return-sampling-mask" in settings.arguments(Path("model"))
    runner = settings.environment().get("VLLM_USE_V2_MODEL_RUNNER")
    assert runner == ("1" if device == "cuda" else None)
    assert "--return-sampling-mask" not in arguments()
