"""Pushes over NCCL between null GPUs."""

import pytest


@pytest.mark.parametrize(
    ("model", "engines", "full_every", "gpus"),
    [("qwen", 2, 1, 4), ("deepseek", 2, 1, 8), ("qwen", 1, 4, 3)],
    ids=["set", "ranks", "differences"],
)
def test_every_engine_has_every_slice_after_each_push(
    on_null_gpu, model, engines, full_every, gpus
):
    arguments = ("nccl_push.py", model, str(engines), str(full_every))
    first, *later = map(int, on_null_gpu(*arguments, gpus=gpus).splitlines()[-1].split())
    for size in later:
        assert size == first if full_every == 1 else size < first / 4
