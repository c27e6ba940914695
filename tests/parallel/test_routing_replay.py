"""Replayed routing against transformers with the same experts forced upon it, on every grid."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks, run_script
from safetensors.torch import load_file

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
MODEL = "deepseek-yarn-mtp"
# fp32 sums in another order; 2e-6 is seen.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def forced(oracle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("routing")
    run_script(HERE, ["routing_reference.py", str(oracle / MODEL), str(out)])
    return out


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        pytest.param(1, ["one", "one+full", "one+moe"], marks=pytest.mark.slow),
        (2, ["tp2", "pp2", "ep2", "cp2", "pp2+full", "pp2xvp2+moe", "pp2xuneven"]),
        pytest.param(4, ["tp2xep2", "pp2xvp2xcp2"], marks=pytest.mark.slow),
    ],
)
def test_logprobs_and_gradients_are_those_of_the_forced_experts(oracle, forced, world_size, grids):
    run_ranks(HERE, world_size, "routing_steps.py", str(oracle / MODEL), str(forced), *grids)
    reference = json.loads((forced / "samples.json").read_text())
    expected = load_file(forced / "weights.safetensors")
    start = load_file(oracle / MODEL / "model.safetensors")
    moved = max((expected[n] - start[n]).abs().max().item() for n in expected)
    for grid in grids:
        report = json.loads((forced / f"{grid}.json").read_text())
        assert report["microbatches"] > 2, "the passes of several micro-batches have to interleave"
        assert report["logprob_diff/max"] < TOLERANCE, grid
        assert report["logprob_diff/without_replay"] > 1e-2, grid
        assert report["routing/agreement"] == pytest.approx(reference["agreement"], abs=1e-9), grid
        assert report["reference_gap"] > 1e-2, f"{grid}: the reference has to route for itself"
        got = load_file(forced / f"{grid}.safetensors")
        for name, tensor in expected.items():
            gap = (got[name] - tensor).abs().max().item()
            assert gap < 1e-4 * moved, f"{grid} {name}: {gap}, the update moved up to {moved}"


def test_replaying_the_own_choice_changes_no_bit(oracle, forced):
    run_ranks(HERE, 1, "routing_steps.py", str(oracle / MODEL), str(forced), "own")
    assert json.loads((forced / "own.json").read_text()) == {"same": True, "agreement": 1.0}


def test_each_rank_is_sent_the_experts_of_its_own_layers_and_tokens(oracle, tmp_path):
    """The ranks are half the layers or half the tokens each: the other one is sent about half of
    what the samples have, where all of it was sent before."""
    grids = ["tp2", "pp2", "cp2", "pp2xvp2"]
    run_ranks(HERE, 2, "routing_shares.py", str(oracle / MODEL), str(tmp_path), *grids)
    hf_config = json.loads((oracle / MODEL / "config.json").read_text())
    layers = hf_config["num_hidden_layers"] - hf_config["first_k_dense_replace"]
    rows = sum(length - 1 for length in (9, 30, 17, 12, 25)) - 5
    whole = rows * layers * hf_config["num_experts_per_tok"]
    for grid in grids:
        found = json.loads((tmp_path / f"{grid}.json").read_text())
        assert found["known"] == rows * (2 if grid.startswith("pp") else 1), grid
        assert 0.3 * whole < found["sent"] < 0.85 * whole, (grid, found, whole)
