"""Pushes over NCCL between null GPUs."""

import pytest


@pytest.mark.parametrize(
    ("model", "arguments", "gpus"),
    [
        ("qwen", [2, 1], 4),
        ("qwen", [2, 1, "colocated"], 2),
        ("deepseek", [2, 1], 8),
        ("deepseek", [2, 1, "colocated"], 4),
        ("qwen", [1, 4], 3),
        ("qwen", [1, 4, "colocated"], 2),
    ],
    ids=[
        "set",
        "set, colocated",
        "ranks",
        "ranks, colocated",
        "differences",
        "differences, colocated",
    ],
)
def test_every_engine_has_every_slice_after_each_push(on_null_gpu, model, arguments, gpus):
    printed = on_null_gpu("nccl_push.py", model, *map(str, arguments), gpus=gpus)
    first, *later = map(int, printed.splitlines()[-1].split())
    for size in later:
        assert size == first if arguments[1] == 1 else size < first / 4
