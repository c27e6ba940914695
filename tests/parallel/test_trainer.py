"""The trainer's metrics, updates and checkpoints do not depend on how the model and the batch are
split.
"""

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent
# fp32 sums in another order, through two updates with a large learning rate.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def single(oracle, tmp_path_factory) -> Path:
    """One process's results and checkpoint."""
    out = tmp_path_factory.mktemp("trainer")
    run_ranks(HERE, 1, "trainer_steps.py", str(oracle / MODEL), str(out), "one")
    return out


MODEL = "deepseek-yarn-mtp"


def close(got: dict, expected: dict, where: str) -> None:
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"{where}: {name}"


@pytest.mark.parametrize(
    ("num_ranks", "grids"),
    [
        (2, ["dp2", "tp2", "pp2", "ep2", "cp2", "pp2xvp2", "pp2xuneven"]),
        pytest.param(4, ["tp2xep2", "pp2xvp2xcp2"], marks=pytest.mark.slow),
        pytest.param(4, ["pp2xep2", "tp2xcp2", "cp4"], marks=pytest.mark.slow),
    ],
)
def test_every_split_gives_one_process_s_metrics_and_weights(single, oracle, num_ranks, grids):
    # Each grid also continues from the checkpoint that the grid before it wrote.
    shutil.copytree(single / "checkpoint_one", single / "checkpoint", dirs_exist_ok=True)
    run_ranks(HERE, num_ranks, "trainer_steps.py", str(oracle / MODEL), str(single), *grids)
    expected = json.loads((single / "one.json").read_text())
    assert expected["next rollout"]["kl"] > 1e-3, "the reference has to differ from the policy here"
    weights = load_file(single / "one.safetensors")
    start = load_file(oracle / MODEL / "model.safetensors")
    moved = max((weights[n] - start[n]).abs().max().item() for n in weights)
    for grid in grids:
        report = json.loads((single / f"{grid}.json").read_text())
        for part, metrics in expected.items():
            close(report[part], metrics, f"{grid} {part}")
        close(report["continued"], expected["next rollout"], f"{grid} from another's checkpoint")
        for name, tensor in load_file(single / f"{grid}.safetensors").items():
            gap = (tensor - weights[name]).abs().max().item()
            assert gap <= TOLERANCE * moved, f"{grid} {name}: {gap}, updates moved up to {moved}"
