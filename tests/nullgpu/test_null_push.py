"""Pushes over NCCL between processes on null GPUs, and engines that are killed in them."""

import json

import pytest


def pushed(on_null_gpu, model: str, engines: int, *words: str) -> dict:
    script = "../unit/null_gpu/push_processes.py"
    printed = on_null_gpu(script, model, str(engines), *words, gpus=12)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(
    ("model", "engines", "words"),
    [
        ("qwen", 1, []),
        ("qwen", 3, []),
        ("deepseek", 2, []),
        ("qwen", 2, ["colocated"]),
        ("deepseek", 2, ["colocated"]),
    ],
    ids=["one engine", "set", "ranks", "set, colocated", "ranks, colocated"],
)
def test_every_engine_has_every_slice_after_each_push(on_null_gpu, model, engines, words):
    seen = pushed(on_null_gpu, model, engines, *words)
    assert seen == {"trainer": True, "versions": [4] * engines, "sets": [engines]}


@pytest.mark.parametrize("killed_at", ["first", "middle", "last"])
@pytest.mark.parametrize(
    ("engines", "words"), [(2, []), (3, []), (2, ["colocated"])], ids=["2", "3", "2, colocated"]
)
def test_an_engine_killed_in_a_push_costs_the_others_a_repeated_one(
    on_null_gpu, engines, words, killed_at
):
    """The other engines' processes and the trainer's are the same afterwards, and nothing of the
    push that broke was loaded. What each loads, it compares with plain slicing."""
    seen = pushed(on_null_gpu, "qwen", engines, *words, killed_at)
    assert seen["lost"] == [0] and seen["others"] == [True] * (engines - 1)
    assert seen["trainer"] and seen["versions"] == [4] * engines and seen["sets"] == [engines]
