"""Training on the branches of a tree of turns equals a naive fp64 loop over transformers in which
every tree is one response, on every layout."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, run_script
from safetensors.torch import load_file

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
MODEL = "qwen-untied"
# fp32 sums in another order, through four updates.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def trees(oracle) -> Path:
    """The model's folder, with what the naive loop makes of it."""
    run_script(HERE, ["tree_oracle.py", str(oracle), MODEL])
    return oracle / MODEL


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (2, ["cp2"]),
        (1, ["one+shared"]),
        pytest.param(1, ["one"], marks=pytest.mark.slow),
        pytest.param(2, ["dp2", "tp2", "pp2", "tp2+shared"], marks=pytest.mark.slow),
        pytest.param(8, ["tp2xcp2xdp2"], marks=pytest.mark.slow),
    ],
)
def test_branches_are_trained_as_one_response(trees, tmp_path, world_size, grids):
    run_ranks(HERE, world_size, "tree_steps.py", str(trees), str(tmp_path), *grids)
    expected = torch.load(trees / "trees.pt")
    start = load_file(trees / "model.safetensors")
    moved = max((expected["weights"][name] - start[name]).abs().max().item() for name in start)
    for grid in grids:
        metrics = json.loads((tmp_path / f"{grid}.json").read_text())
        for update, (got, wanted) in enumerate(zip(metrics, expected["metrics"], strict=True)):
            for name in ("loss", "grad_norm"):
                near = pytest.approx(wanted[name], rel=TOLERANCE, abs=TOLERANCE)
                assert got[name] == near, f"{grid}, update {update}: {name}"
            assert (got["clip_fraction"] > 0) == bool(update % 2), f"{grid}, update {update}"
        for name, tensor in load_file(tmp_path / f"{grid}.safetensors").items():
            gap = (tensor - expected["weights"][name]).abs().max().item()
            assert gap <= TOLERANCE * moved, f"{grid} {name}: {gap}, updates moved up to {moved}"
