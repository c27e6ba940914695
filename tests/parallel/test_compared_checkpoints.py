"""`megatron-r1 compare` on runs of the real trainer with one planted change each."""

import json
from pathlib import Path

import compared_runs
import pytest
from ranks import run_ranks

from megatron_r1.commands.compare.verb import compare

pytestmark = pytest.mark.more
HERE = Path(__file__).parent
MODEL = "deepseek-yarn-mtp"
PHASE = {
    # In float32 master weights are the weights.
    **{"weights": "update", "main_grad": "gradient", "exp_avg": "gradient"},
    **{"exp_avg_sq": "gradient", "reference": "reference", "rng": "random streams"},
}
PREFIX = {"main_grad": "exp_avg", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}


@pytest.fixture(scope="module")
def runs(oracle, tmp_path_factory) -> dict[str, Path]:
    """A folder of runs for each of two layouts of two ranks."""
    out = {grid: tmp_path_factory.mktemp(grid) for grid in ("tp2", "pp2")}
    for grid, folder in out.items():
        run_ranks(HERE, 2, "compared_runs.py", str(oracle / MODEL), grid, str(folder))
    return out


@pytest.mark.parametrize("grid", ["tp2", "pp2"])
def test_one_planted_change_is_found_at_its_step_phase_rank_and_tensor(runs, grid):
    folder = runs[grid]
    planted = json.loads((folder / "planted.json").read_text())
    found = compare(folder / "equal", folder / "equal_again")
    assert found.checkpoints == [1, 2, 3, 4] and found.differences == []
    for name, change in compared_runs.PLANTS.items():
        first = compare(folder / "equal", folder / name).first_difference
        assert first is not None, name
        assert (first.step, first.phase) == (change.step, PHASE[change.of]), (name, first)
        if change.of == "rng":
            assert first.name == "rng of rank 1"
            continue
        assert first.ranks == ([1], [1]), (name, first)
        assert first.name.startswith(PREFIX.get(change.of, "")), (name, first)
        assert tensor(first.name) == tensor(planted[name]), (name, first)


def test_two_layouts_are_equal_to_rounding(runs):
    found = compare(runs["tp2"] / "equal", runs["pp2"] / "equal")
    assert len(found.settings) == 2
    assert found.first_difference is not None and found.first_beyond_rounding is None
    # The same, and a changed tensor: rounding of everything does not hide it.
    planted = compare(runs["tp2"] / "equal", runs["pp2"] / "gradient_tensor")
    apart = planted.first_beyond_rounding
    assert apart is not None and (apart.step, apart.phase) == (3, "gradient")
    assert tensor(apart.name) == "self_attention.linear_proj.weight"


def tensor(name: str) -> str:
    """Return a parameter's name without the layer's number, which differs between ranks and
    checkpoints of pipelines, and without the index of its expert."""
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
