"""What vLLM's CUDA engines leave for KV cache on the null GPU, compared with the plan's rows."""

import json
from itertools import pairwise

import pytest
from nullgpu.conftest import ROOT

from megatron_r1 import config as configuration
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import FP8_BYTES, pass_memory, vllm_table


def planned_bytes(dtype: str, ranks: int, experts: str, tokens: int) -> float:
    """The plan's rows for V3 in engines of so many GPUs, each a data rank.

    They are of Triton's experts. DeepGEMM's quantize within their workspace, and have the scales of
    its operands twice, by rows and by columns."""
    rollout = {"engines": 1, "tensor_parallel": 1, "data_parallel": ranks, "redundant_experts": 0}
    changed = {f"rollout.{key}": value for key, value in rollout.items()}
    changed |= {"rollout.expert_parallel": ranks > 1, "push.fp8": dtype == "fp8"}
    recipe = ROOT / "examples/deepseek_r1/r1_zero.yaml"
    hf_config = read_hf_config(ROOT / "examples/deepseek_r1/model") | {"n_routed_experts": 8}
    config = configuration.load_recipe(recipe, changed)
    job = PlannedJob(hf_config, config, ranks, HARDWARE["H200"], rollout_gpus=ranks)
    rows = pass_memory(job, tokens)
    planned = rows["workspace of experts"].number + rows["hidden states"].number
    if experts == "triton":
        return planned
    lines, passed = vllm_table()["expert workspace"]["7168 x 2048 x 8"], ranks * tokens
    per_token, per_expert, rest = lines["DEEPGEMM"]
    workspace = per_token * passed + per_expert * (8 // ranks) + rest
    scales = passed * 8 * 2 * (7168 // 128) * 4
    triton = passed * (lines["TRITON"][0] + 8 * 2048 * FP8_BYTES)
    return planned - triton + workspace + scales


@pytest.mark.parametrize(
    ("dtype", "ranks", "experts"),
    [
        ("bf16", 1, "triton"),
        ("bf16", 2, "triton"),
        ("fp8", 1, "triton"),
        ("fp8", 2, "triton"),
        ("fp8", 2, "deep_gemm"),
    ],
)
def test_the_cache_shrinks_as_planned_with_the_tokens_of_a_pass(
    on_null_gpu, tmp_path, dtype, ranks, experts
):
    """All other memory of an engine is the same at each limit.

    torch gives a tensor up to 20 MiB more than it needs, as vLLM limits its splits meanwhile: the
    limits are wide."""
    limits = (4096, 8192, 16384)
    arguments = ["engine_memory.py", str(tmp_path / "model"), dtype, str(ranks), experts]
    printed = on_null_gpu(*arguments, *map(str, limits), gpus=ranks)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"tokens"')]
    assert [line["tokens"] for line in lines] == list(limits)
    for fewer, more in pairwise(lines):
        planned = [planned_bytes(dtype, ranks, experts, line["tokens"]) for line in (more, fewer)]
        for left, less in zip(fewer["bytes"], more["bytes"], strict=True):
            assert left - less == pytest.approx(planned[0] - planned[1], rel=0.02)
