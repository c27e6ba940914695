from pathlib import Path

import pytest
from grids import models_on
from ranks import run_ranks, run_script

HERE = Path(__file__).parent

TWO_RANKS = ["tp2", "pp2", "pp2xvp2", "pp2xuneven", "ep2", "cp2", "tp2xetp2", "tp2xsequence"]
# Every pair of axes, and more than two where one needs another.
FOUR_RANKS = [
    *("tp2xpp2", "tp2xep2", "tp2xcp2", "tp2xdp2", "pp2xep2", "pp2xcp2", "pp2xdp2"),
    *("ep2xcp2", "ep2xdp2", "cp2xdp2", "tp2xetp2", "ep2xetp2", "cp4", "pp4xapart"),
    *("pp2xvp2xtp2", "pp2xvp2xep2", "pp2xunevenxcp2", "tp4"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


# A launch costs seconds of imports, so each one walks through all the grids of its size.
@pytest.mark.parametrize(
    "world_size, models, grids",
    [
        pytest.param(1, "first", ["one"], id="1"),
        pytest.param(1, "rest", ["one"], id="1-rest", marks=pytest.mark.slow),
        pytest.param(2, "first", TWO_RANKS, id="2"),
        pytest.param(2, "gpt-oss", ["tp2xep2"], id="2-gpt-oss"),
        pytest.param(2, "rest", TWO_RANKS, id="2-rest", marks=pytest.mark.slow),
        pytest.param(4, "first", FOUR_RANKS, id="4", marks=pytest.mark.more),
        pytest.param(8, "first", ["tp2xpp2xep2xcp2"], id="8"),
    ],
)
def test_logits_gradients_and_checkpoints_equal_transformers(
    oracle, out, world_size, models, grids
):
    compare(oracle, out, world_size, models, grids)


@pytest.mark.more
@pytest.mark.parametrize(
    "world_size, count, grids",
    [
        pytest.param(1, 1, ["one"], id="9"),
        pytest.param(1, 8, ["one"], id="72", marks=pytest.mark.slow),
        pytest.param(2, 3, ["tp2", "pp2", "ep2"], id="27-on-2", marks=pytest.mark.slow),
    ],
)
def test_random_configurations_equal_transformers(tmp_path, out, world_size, count, grids):
    models = f"drawn-{count}"
    run_script(HERE, ["oracle.py", str(tmp_path), models])
    compare(tmp_path, out, world_size, models, grids)


def compare(oracle, out, world_size, models, grids):
    arguments = (str(oracle), str(out), models, *grids)
    output = run_ranks(HERE, world_size, "against_transformers.py", *arguments)
    for grid in grids:
        num_models = len(models_on(grid, world_size, models))
        compared = [line for line in output.splitlines() if f" {grid} " in line]
        assert sum("round trip" in line for line in compared) == num_models, output[-3000:]
        assert sum("gradients" in line for line in compared) == num_models, output[-3000:]


@pytest.mark.more
def test_weight_files_that_do_not_fit_are_refused_and_others_are_exact(oracle, tmp_path):
    output = run_ranks(HERE, 2, "weight_files.py", str(oracle), str(tmp_path))
    assert "random_weights_do_not_depend_on_the_split" in output


@pytest.mark.more
def test_each_number_of_a_checkpoint_is_read_by_one_rank(oracle, tmp_path):
    grids = ["dp2", "cp2", "ep2"]
    output = run_ranks(HERE, 2, "shared_reads.py", str(oracle), str(tmp_path), *grids)
    assert [f"{grid} holds" in output for grid in grids] == [True] * len(grids), output[-3000:]
