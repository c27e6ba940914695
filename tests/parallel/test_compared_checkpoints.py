"""`megatron-r1 compare` on runs of the real trainer with one planted change each."""

import re
from pathlib import Path

import compared_runs
import pytest
from ranks import run_ranks

from megatron_r1.commands.compare.runs import compare_runs

pytestmark = pytest.mark.more
HERE = Path(__file__).parent
MODEL = "deepseek-yarn-mtp"
LAYOUTS = ("tp2xep2", "pp2")
PHASE = {
    # In float32 master weights are the weights.
    **{"weights": "update", "untrained": "weights", "main_grad": "gradient", "exp_avg": "gradient"},
    **{"exp_avg_sq": "gradient", "reference": "reference", "rng": "random streams"},
}
STATES = {
    # A gradient shows in both moments: the one that it changed more comes first.
    **{"weights": ("param.",), "main_grad": ("exp_avg.", "exp_avg_sq.")},
    **{"exp_avg": ("exp_avg.",), "exp_avg_sq": ("exp_avg_sq.",), "reference": ("reference.",)},
}


@pytest.fixture(scope="module")
def runs(oracle, tmp_path_factory) -> dict[str, Path]:
    """A folder of runs for each of two layouts of two ranks."""
    out = {grid: tmp_path_factory.mktemp(grid) for grid in LAYOUTS}
    for grid, folder in out.items():
        run_ranks(HERE, 2, "compared_runs.py", str(oracle / MODEL), grid, str(folder))
    return out


@pytest.mark.parametrize("grid", LAYOUTS)
def test_one_planted_change_is_found_at_its_step_phase_rank_and_tensor(runs, grid):
    folder = runs[grid]
    found = compare_runs(folder / "equal", folder / "equal_again")
    assert found.checkpoints == [1, 2, 3, 4] and found.differences == []
    for name, change in compared_runs.PLANTS.items():
        first = compare_runs(folder / "equal", folder / name).first_difference
        assert first is not None, name
        assert (first.step, first.phase) == (change.step, PHASE[change.of]), (name, first)
        if change.of == "rng":
            assert first.name == "rng of rank 1"
            continue
        assert first.ranks == ([change.rank], [change.rank]), (name, first)
        tensor, expert = stored(change.name)
        names = [state + tensor for state in STATES.get(change.of, ("",))]
        assert first.name in names, (name, first)
        # The clip of a gradient's norm carries a changed gradient into all the others.
        if expert is not None and change.of != "main_grad":
            assert first.place.startswith(f"at [{expert}, "), (name, first)


def test_two_layouts_are_equal_to_rounding(runs):
    found = compare_runs(runs["tp2xep2"] / "equal", runs["pp2"] / "equal")
    assert len(found.settings) == 3  # tensor, pipeline, expert
    assert found.first_difference is not None and found.first_beyond_rounding is None
    # The same, and a changed tensor: rounding of everything does not hide it.
    planted = compare_runs(runs["tp2xep2"] / "equal", runs["pp2"] / "gradient_tensor")
    apart = planted.first_beyond_rounding
    assert apart is not None and (apart.step, apart.phase) == (3, "gradient")
    assert apart.name in [state + compared_runs.PROJECTION for state in STATES["main_grad"]]


def stored(name: str) -> tuple[str, str | None]:
    """Return a parameter's name in a checkpoint, which stacks a layer's experts, and its expert."""
    parts = re.fullmatch(r"(.*experts)\.local_experts\.(\d+)\.(.*)", name)
    return (name, None) if parts is None else (f"{parts[1]}.experts.{parts[3]}", parts[2])
