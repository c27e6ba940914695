"""MTP layers during RL: left out, frozen, trained.

Oracle: transformers' gradients of the MTP layers (oracle.py), whose loss has the same targets.
"""

from pathlib import Path

import pytest
import torch
from mtp_steps import MAX_RESPONSE
from ranks import run_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent
MODEL = "deepseek-yarn-mtp"
# fp32 sums in another order; 3e-6 of a tensor's largest element is seen in supervised training.
TOLERANCE = 5e-5


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (1, ["one"]),
        pytest.param(2, ["tp2", "cp2"], marks=pytest.mark.slow),
        pytest.param(4, ["pp4xapart"], marks=pytest.mark.slow),
    ],
)
def test_mtp_layers_learn_apart_from_the_policy(oracle, tmp_path, world_size, grids):
    run_ranks(HERE, world_size, "mtp_steps.py", str(oracle / MODEL), str(tmp_path), *grids)
    start = load_file(oracle / MODEL / "model.safetensors")
    answers = load_file(oracle / MODEL / "gradients.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in start if ".layers." in name)
    mtp = f"model.layers.{layers - 1}."
    for grid in grids:
        none, frozen, trained, gradients = (
            load_file(tmp_path / f"{grid}-{part}.safetensors")
            for part in ("none", "frozen", "train", "gradients")
        )
        policy = none.keys()
        assert not any(name.startswith(mtp) for name in policy)
        assert any(not torch.equal(none[name], start[name]) for name in policy)
        for name in policy:
            assert torch.equal(frozen[name], none[name]), f"{grid} {name}: frozen"
            assert torch.equal(trained[name], none[name]), f"{grid} {name}: train"
        own = [name for name in answers if name.startswith(mtp)]
        assert len(own) > 10
        for name in own:
            assert torch.equal(frozen[name], start[name]), f"{grid} {name}: frozen"
            expected = answers[name] / MAX_RESPONSE
            scale = expected.abs().max().clamp(min=1e-6).item()
            gap = (gradients[name] - expected).abs().max().item()
            assert gap <= TOLERANCE * scale, f"{grid} {name}: {gap} of {scale}"
            if scale > 1e-6:
                assert not torch.equal(trained[name], start[name]), f"{grid} {name}: not trained"
