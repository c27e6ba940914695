"""vLLM's CUDA model classes and an engine process, on the null GPU."""

import json
from pathlib import Path

import pytest
from nullgpu.conftest import HERE, IMPORTS
from ranks import run_script


def swapped(on_null_gpu, folder: Path, *words: str) -> list[dict]:
    """What a swap of each model has left, when the memory that held what came is freed."""
    given = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    printed = on_null_gpu("vllm_needs.py", str(folder), *words, **given)
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]


def test_what_vllm_loads_is_what_the_tables_predict_and_a_swap_keeps_addresses(
    on_null_gpu, tmp_path
):
    fp8_experts = ["deepseek-fp8", "deepseek-fp8-deep_gemm"]
    cases = ["deepseek", "deepseek-without-q-lora", *fp8_experts, "qwen", "qwen-fp8", "llama"]
    cases += ["QWEN3", "QWEN3_MOE", "GLM"]
    found = swapped(on_null_gpu, tmp_path / "models", *cases)
    assert [case["case"] for case in found] == cases
    for case in found:
        assert not case["wrong"] and not case["moved"] and case["norm arrived"], case
        assert bool(case["scales"]) == ("fp8" in case["case"])
        assert bool(case["kept scales"]) == (case["case"] in fp8_experts)
        assert case["tensors"] > 20 and not case["freed scales"], case


def test_scales_that_kernels_keep_in_freed_memory_are_found(on_null_gpu, tmp_path):
    (found,) = swapped(on_null_gpu, tmp_path / "models", "deepseek-fp8", "planted")
    assert len(found["freed scales"]) == found["kept scales"] > 0


def test_an_engine_computes_what_transformers_does(on_null_gpu, tmp_path):
    command = ["engine_answers.py", "engine", str(tmp_path), "qwen"]
    sampled = json.loads(on_null_gpu(*command, computes=True).splitlines()[-1])
    variables = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(IMPORTS)}
    on_cpu = run_script(HERE, ["engine_answers.py", "transformers", str(tmp_path)], **variables)
    expected = json.loads(on_cpu.splitlines()[-1])
    # The engine rounds to bf16; tokens' log-probabilities differ by several nats.
    assert sampled[0] == pytest.approx(expected[0], abs=0.15)
    assert sampled[1:] == [pytest.approx(one, abs=0.15) for one in expected[1:]]


def test_experts_by_deep_gemm_are_those_of_torch(on_null_gpu):
    distance = float(on_null_gpu("deep_gemm_experts.py", computes=True).splitlines()[-1])
    assert distance < 0.1  # 0.06: the interpreter cuts the values between the products off to FP8


@pytest.mark.parametrize(
    ("transport", "engines", "weights"),
    [
        ("shm", 1, "bf16"),
        ("shm", 1, "fp8"),
        ("cuda_ipc", 1, "bf16"),
        ("nccl", 1, "bf16"),
        ("nccl", 2, "bf16"),
    ],
)
def test_engines_have_what_was_pushed_before_and_after_they_slept(
    on_null_gpu, tmp_path, transport, engines, weights
):
    arguments = [str(tmp_path), transport, str(engines), weights]
    visible = ",".join(map(str, range(2 * engines)))  # engines share them equally
    printed = on_null_gpu(
        "engine_push.py", *arguments, gpus=2 * engines, CUDA_VISIBLE_DEVICES=visible
    )
    found = json.loads(printed.splitlines()[-1])
    for loaded, other, pushed in zip(*found["checksums"], strict=True):
        # What wakes is full of NaN: a tensor that is not written again would differ.
        assert len(loaded) > 10 and pushed == loaded
        assert not [name for name in loaded if other[name] == loaded[name]]
    # Next to the weights, buckets of the push before may still be held.
    awake, *asleep, again = found["GiB left"]
    assert again == pytest.approx(awake, abs=0.2)
    assert [left - awake > 1 for left in asleep] == [True] * (engines == 1)


def test_a_push_through_cuda_ipc_reaches_the_memory_of_another_process(on_null_gpu):
    test = str(Path(__file__).parents[1] / "gpu" / "test_push_cuda_ipc.py")
    assert "1 passed" in on_null_gpu("-m", "pytest", "-p", "no:cacheprovider", test, computes=True)
