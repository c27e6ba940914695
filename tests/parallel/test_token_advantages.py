"""Advantages of single tokens do not depend on which ranks hold which tokens and samples."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
MODEL = "qwen-untied"
# fp32 log-probabilities in another order, summed over 40 tokens; then eight large updates.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def single(oracle, tmp_path_factory) -> Path:
    """One process's advantages, metrics and weights."""
    out = tmp_path_factory.mktemp("algorithms")
    run_ranks(HERE, 1, "algorithm_steps.py", str(oracle / MODEL), str(out), "one")
    return out


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [(2, ["dp2", "cp2", "pp2"]), pytest.param(4, ["cp2xdp2"], marks=pytest.mark.slow)],
)
def test_every_split_gives_one_process_s_advantages_and_updates(single, oracle, world_size, grids):
    run_ranks(HERE, world_size, "algorithm_steps.py", str(oracle / MODEL), str(single), *grids)
    expected = json.loads((single / "one.json").read_text())
    weights = load_file(single / "one.safetensors")
    start = load_file(oracle / MODEL / "model.safetensors")
    moved = max((weights[n] - start[n]).abs().max().item() for n in weights)
    for grid in grids:
        report = json.loads((single / f"{grid}.json").read_text())
        for name, answers in expected.items():
            got = report[name]
            assert got["advantages"].keys() == answers["advantages"].keys(), f"{grid} {name}"
            for where, numbers in answers["advantages"].items():
                near = pytest.approx(numbers, rel=TOLERANCE, abs=TOLERANCE)
                assert got["advantages"][where] == near, f"{grid} {name} {where}"
            for one, other in zip(got["updates"], answers["updates"], strict=True):
                assert one == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE), f"{grid} {name}"
        for name, tensor in load_file(single / f"{grid}.safetensors").items():
            gap = (tensor - weights[name]).abs().max().item()
            assert gap <= TOLERANCE * moved, f"{grid} {name}: {gap}, updates moved up to {moved}"


def test_the_advantages_are_those_of_the_algorithm(single):
    """Of one process, by facts of the definitions: see `test_algorithms.py`."""
    found = json.loads((single / "one.json").read_text())
    normal = [numbers[0] for numbers in found["reinforce_pp"]["advantages"].values()]
    mean = sum(normal) / len(normal)
    square = sum(a * a for a in normal) / len(normal)
    assert mean == pytest.approx(0, abs=1e-5) and square == pytest.approx(1, rel=1e-4)
    trained = {key.split(":")[0] for key in found["reinforce_pp"]["advantages"]}
    # The sixth of each rollout is ungraded: no token of it is trained on.
    wanted = {f"{seed}.{i}" for seed in (11, 12) for i in range(12) if i != 5}
    assert trained == wanted
    assert all(len(numbers) == 2 for numbers in found["ppo"]["advantages"].values())
    _, first, second = (update.get("kl") for update in found["rloo"]["updates"])
    assert first == pytest.approx(0, abs=1e-9) and second > 1e-9, (
        "the reference is the policy before the first update"
    )
    shares = [
        found["rloo"]["updates"][0]["engine_mask/tokens"],
        found["on_policy_distillation"]["updates"][0]["engine_mask/responses"],
        found["reinforce_pp"]["updates"][2]["engine_mask/tokens"],
    ]
    assert all(0.05 < share < 0.95 for share in shares), shares
