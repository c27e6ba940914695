"""A rehearsal on null GPUs of a recipe whose engines leave the trainer too little of a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "distill" / "qwen2.5-32b_rl.yaml"


@pytest.mark.parametrize(
    ("share", "named"),
    [
        # The trainer's context is on the GPU when the engine starts; its weights and the KV cache
        # of an engine that wakes are there together.
        ("0.98", "less than desired GPU memory utilization (0.98"),
        ("0.93", "Call to wake_up method failed: CUDA Error: out of memory"),
    ],
)
def test_a_share_of_the_gpu_that_leaves_no_room_is_named(tmp_path, share, named):
    command = [sys.executable, "-m", "megatron_r1", "rehearse", str(RECIPE), "--on", "null-gpu"]
    command += ["--rehearsal.max_ranks", "1", "--rehearsal.folder", str(tmp_path / "rehearsal")]
    command += ["--rollout.gpu_memory", share]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert named in done.stderr, done.stderr
