"""vLLM's CUDA model classes and an engine process, on the null GPU."""

import json


def test_what_vllm_loads_is_what_the_tables_predict_and_a_swap_keeps_addresses(
    on_null_gpu, tmp_path
):
    cases = ["deepseek", "deepseek-without-q-lora", "deepseek-fp8", "qwen", "qwen-fp8", "llama"]
    cases += ["QWEN3", "QWEN3_MOE", "GLM"]
    printed = on_null_gpu("vllm_needs.py", str(tmp_path / "models"), *cases)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    assert [case["case"] for case in found] == cases
    for case in found:
        assert not case["wrong"] and not case["moved"] and case["norm arrived"], case
        assert bool(case["scales"]) == case["case"].endswith("fp8")
        assert case["tensors"] > 20


def test_two_pushes_to_an_engine_give_it_what_it_loads_from_a_file(on_null_gpu, tmp_path):
    printed = on_null_gpu("engine_push.py", str(tmp_path))
    loaded, other, pushed = json.loads(printed.splitlines()[-1])
    assert len(loaded) > 10 and pushed == loaded
    assert not [name for name in loaded if other[name] == loaded[name]]
