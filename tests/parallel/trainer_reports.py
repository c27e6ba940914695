"""Comparing what `trainer_steps.py` reports of two grids."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

# fp32 sums in another order, through two updates with a large learning rate.
TOLERANCE = 2e-4


def assert_same(model: Path, single: Path, out: Path, grid: str, continued: bool = True) -> None:
    """Compare OUT/GRID.json and .safetensors with SINGLE.json and .safetensors: metrics of every
    part, those of a trainer that continued from another grid's checkpoint, and trained weights."""
    expected = json.loads(single.with_suffix(".json").read_text())
    weights, start = load_file(f"{single}.safetensors"), load_file(model / "model.safetensors")
    moved = max((weights[n] - start[n]).abs().max().item() for n in weights)
    report = json.loads((out / f"{grid}.json").read_text())
    for part, metrics in expected.items():
        assert_close(report[part], metrics, f"{grid} {part}")
    if continued:
        where = f"{grid} from another's checkpoint"
        assert_close(report["continued"], expected["next rollout"], where)
    for name, tensor in load_file(out / f"{grid}.safetensors").items():
        gap = (tensor - weights[name]).abs().max().item()
        assert gap <= TOLERANCE * moved, f"{grid} {name}: {gap}, updates moved up to {moved}"


def assert_close(got: dict, expected: dict, where: str) -> None:
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"{where}: {name}"
