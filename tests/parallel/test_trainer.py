"""The trainer's metrics, updates and checkpoints do not depend on how the model and the batch are
split.
"""

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from trainer_reports import assert_same

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def single(oracle, tmp_path_factory) -> Path:
    """One process's results and checkpoint."""
    out = tmp_path_factory.mktemp("trainer")
    run_ranks(HERE, 1, "trainer_steps.py", str(oracle / MODEL), str(out), "one")
    return out


MODEL = "deepseek-yarn-mtp"


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (2, ["tp2", "pp2xvp2", "cp2", "dp2", "ep2"]),
        pytest.param(2, ["pp2", "pp2xuneven", "tp2xetp2"], marks=pytest.mark.more),
        pytest.param(4, ["tp2xep2", "pp2xvp2xcp2"], marks=pytest.mark.slow),
        pytest.param(4, ["pp2xep2", "tp2xcp2", "cp4"], marks=pytest.mark.slow),
    ],
)
def test_every_split_gives_one_process_s_metrics_and_weights(single, oracle, world_size, grids):
    # Each grid also continues from the checkpoint that the grid before it wrote.
    shutil.copytree(single / "checkpoint_one", single / "checkpoint", dirs_exist_ok=True)
    run_ranks(HERE, world_size, "trainer_steps.py", str(oracle / MODEL), str(single), *grids)
    expected = json.loads((single / "one.json").read_text())
    assert expected["next rollout"]["kl"] > 1e-3, "the reference has to differ from the policy here"
    for grid in grids:
        assert_same(oracle / MODEL, single / "one", single, grid)


@pytest.mark.more
@pytest.mark.parametrize("model", ["qwen-tied", pytest.param("llama3", marks=pytest.mark.slow)])
def test_a_dense_model_s_sequences_split_over_tensor_ranks_give_the_same(oracle, tmp_path, model):
    """A model with experts always splits them; a dense one does where a recipe asks for it."""
    arguments = ("trainer_steps.py", str(oracle / model), str(tmp_path))
    run_ranks(HERE, 1, *arguments, "one")
    shutil.copytree(tmp_path / "checkpoint_one", tmp_path / "checkpoint")
    grids = ["tp2xsequence", "tp2"]
    run_ranks(HERE, 2, *arguments, *grids)
    for grid in grids:
        assert_same(oracle / model, tmp_path / "one", tmp_path, grid)


@pytest.mark.more
def test_norms_and_biases_do_not_decay(oracle):
    model = str(oracle / MODEL)
    output = run_ranks(HERE, 2, "weight_decay_steps.py", model, "dp2", "pp2xvp2")
    assert "dp2 holds" in output and "pp2xvp2 holds" in output
