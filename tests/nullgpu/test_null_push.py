"""Pushes over NCCL between null GPUs."""

import pytest


@pytest.mark.parametrize(
    ("model", "arguments", "gpus"),
    [
        ("qwen", ["2"], 4),
        ("qwen", ["2", "colocated"], 2),
        ("deepseek", ["2"], 8),
        ("deepseek", ["2", "colocated"], 4),
        ("qwen", ["1"], 3),
    ],
    ids=["set", "set, colocated", "ranks", "ranks, colocated", "one engine"],
)
def test_every_engine_has_every_slice_after_each_push(on_null_gpu, model, arguments, gpus):
    on_null_gpu("nccl_push.py", model, *arguments, gpus=gpus)
