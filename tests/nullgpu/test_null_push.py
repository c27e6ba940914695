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
    assert seen.pop("seconds")
    assert seen == {"trainer": True, "current": [True] * engines, "sets": [engines]}


@pytest.mark.parametrize(
    ("engines", "words"), [(2, []), (3, []), (2, ["colocated"])], ids=["2", "3", "2, colocated"]
)
def test_an_engine_killed_in_a_push_costs_the_others_a_repeated_one(on_null_gpu, engines, words):
    """At the first, a middle and the last round, one after another. The other engines' processes
    and the trainer's are the same afterwards, and nothing of the push that broke was loaded. What
    each loads, it compares with plain slicing."""
    seen = pushed(on_null_gpu, "qwen", engines, *words, "first", "middle", "last")
    assert min(seen.pop("rounds")) > 3 and seen.pop("seconds")
    assert seen == {
        "lost": [0] * 3,
        "others": [True] * 3 * (engines - 1),
        "trainer": True,
        "current": [True] * engines,
        "sets": [engines],
    }
