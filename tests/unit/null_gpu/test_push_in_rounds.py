"""The sender and the receiver of a push over NCCL, in the order of the plan, on the null GPU's
streams and NCCL. With torch for CUDA: tests/nullgpu/test_null_push.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_script

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture
def variables(null_gpu_library, segment):
    """The environment of processes on null GPUs."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", HERE]
    return {
        "NULL_GPU_LIBRARY": str(null_gpu_library),
        "NULL_GPU_SEGMENT": str(segment),
        "NULL_GPUS": "16",
        "NULL_GPU_QUEUES": "8",  # CUDA's default
        "PYTHONPATH": ":".join(map(str, paths)),
    }


@pytest.fixture
def run(variables):
    """A function that runs a script here on null GPUs, and returns its output."""

    def run(script: str, *arguments: str) -> str:
        return run_script(HERE, [script, *arguments], **variables)

    return run


@pytest.mark.more
def test_every_rank_has_every_slice_after_each_push(run):
    """One process: most of its time it imports."""
    pools = ["qwen", "1", "pool", "deepseek", "3", "pool"]
    run("host_push.py", *pools, "qwen", "1", "colocated", "deepseek", "2", "colocated")


@pytest.mark.more
@pytest.mark.parametrize("engines", [2, 3])
def test_an_engine_killed_in_a_push_costs_the_others_a_repeated_one(run, engines):
    """At the first, a middle and the last round, one after another. The other engines' processes
    and the trainer's are the same afterwards, and nothing of the push that broke was loaded. What
    each loads, it compares with plain slicing."""
    printed = run("push_processes.py", "qwen", str(engines), "host", "first", "middle", "last")
    seen = json.loads(printed.splitlines()[-1])
    assert min(seen.pop("rounds")) > 3 and seen.pop("seconds")
    assert seen == {
        "lost": [0] * 3,
        "others": [True] * 3 * (engines - 1),
        "trainer": True,
        "current": [True] * engines,
        "sets": [engines],
    }


@pytest.mark.more
def test_the_check_of_real_gpus_names_a_push_that_delivers_other_bytes(variables):
    planted = ROOT / "tests" / "unit" / "tools" / "planted_in_checks"
    variables["PYTHONPATH"] = f"{planted}:{ROOT / 'tests' / 'gpu'}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", "import nccl_push; nccl_push.check(print)"],
        cwd=ROOT,
        env=os.environ | variables | {"PLANTED": "bytes"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode and "AssertionError" in last and "layers.0" in last, done.stdout
