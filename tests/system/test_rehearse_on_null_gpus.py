"""The 671B recipes in miniature on null GPUs, with copies of experts that vLLM's balancer moves; a
stale FP8 scale, which such a rehearsal must name.

They need the CUDA environment (`make setup-cuda`), and up to half an hour each on two cores. With
REHEARSE_JSON=FILE the tables of what went through are kept there, in an object that may be `{}`."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_rehearse import ROOT, keep

PYTHON = ROOT / ".venv-cuda" / "bin" / "python"
TREES = ("megatron_r1", "kernels", "grading", "tools", "examples")
RANKS = 2
"""Of the trainer, for the memory of a small machine. Engines share its GPUs, or have as many."""
FP32_SCALES = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
"""What r1_zero_fp8.yaml sets for Transformer Engine."""
BALANCED = ("rollout.redundant_experts", "rollout.vllm")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-cuda: make setup-cuda"),
]


def rehearse(tree: Path, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "megatron_r1", "rehearse"]
    command += [str(tree / f"examples/deepseek_r1/{name}.yaml"), "--on", "null-gpu"]
    command += ["--rehearsal.max_ranks", str(RANKS), "--rehearsal.folder", str(folder)]
    imports = ":".join(map(str, (tree, tree / "kernels", tree / "grading")))
    env = os.environ | FP32_SCALES | {"PYTHONPATH": imports}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["r1_zero", "r1_zero_pools", "r1_zero_fp8"])
def test_a_671b_recipe_goes_through_with_moved_copies_of_experts(name, tmp_path):
    done = rehearse(ROOT, name, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*/rehearsal.json")
    structure = {row["what"]: row for row in json.loads(written.read_text())["structure"]}
    for setting in BALANCED:
        assert structure[setting]["exercised"] == "yes", structure[setting]
    # Each engine rank says after a push, or before a sleep, in how many slots there are experts
    # that a load puts elsewhere.
    logs = [log.read_text() for log in tmp_path.glob("**/logs/*.log")]
    moved = [int(slots) for log in logs for slots in re.findall(r"moved experts to (\d+) sl", log)]
    assert sum(moved) > 0, moved
    keep(name, tmp_path)


def test_a_stale_fp8_scale_is_named(tmp_path):
    """After the first push an engine keeps the scales of its FP8 blocks and loads the weights."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "build")
    for part in TREES:
        shutil.copytree(ROOT / part, tree / part, ignore=ignored)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tree)
    reload = tree / "megatron_r1/engines/plugin/layer_reload.py"
    load = "                tensor.data.copy_(new_tensor)\n"
    kept = (
        "                if 'scale' not in name or 'loaded_once' not in vars(layer):\n"
        "                    tensor.data.copy_(new_tensor)\n"
        "    vars(layer)['loaded_once'] = True\n"
    )
    text = reload.read_text()
    assert text.count(load) == 1
    reload.write_text(text.replace(load, kept))
    done = rehearse(tree, "r1_zero_fp8", tmp_path / "rehearsal")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "are not what the engine computes with" in done.stderr, done.stderr
    assert "scale" in done.stderr, done.stderr
