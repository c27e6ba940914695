"""Adapters: logits, gradients and exports equal transformers' with merged weights, on any grid."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_shapes import adapted as is_adapted
from lora_shapes import compared_on
from ranks import run_ranks, run_script
from safetensors.torch import load_file
from trainer_reports import TOLERANCE, assert_close

from megatron_r1.base.errors import UserError
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights

HERE = Path(__file__).parent
MODEL = "deepseek-all"
STATES = ("param", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A folder with models, adapters and what transformers computes with both."""
    folder = tmp_path_factory.mktemp("adapted")
    run_script(HERE, ["lora_oracle.py", str(folder)])
    return folder


@pytest.mark.parametrize(
    ("world_size", "names", "grids"),
    [
        (1, "qwen-some+deepseek-all", ["one"]),
        pytest.param(2, "all", ["tp2", "pp2", "ep2", "cp2"], marks=pytest.mark.slow),
        pytest.param(4, "all", ["tp2xpp2", "tp2xep2", "tp2xetp2", "tp4"], marks=pytest.mark.slow),
    ],
)
def test_adapters_equal_transformers_with_merged_weights(
    adapted, tmp_path, world_size, names, grids
):
    arguments = [str(adapted), str(tmp_path), names, *grids]
    output = run_ranks(HERE, world_size, "lora_steps.py", *arguments)
    for grid in grids:
        for name in names.split("+") if names != "all" else compared_on(grid):
            for what in ("logits: ", "merged weights: ", " gradients ("):
                lines = [x for x in output.splitlines() if x.startswith(f"{name} {grid} ")]
                assert sum(what in line for line in lines) == 1, (name, grid, what, output[-3000:])


@pytest.fixture(scope="module")
def trained(adapted, tmp_path_factory) -> Path:
    """What one process trains: metrics, merged weights, and a checkpoint."""
    out = tmp_path_factory.mktemp("trained")
    run_ranks(HERE, 1, "lora_training.py", str(adapted / MODEL), str(out), "one")
    shutil.copytree(out / "checkpoint_one", out / "checkpoint")
    return out


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_alone_and_names_another_model(adapted, trained):
    factors = load_file(adapted / MODEL / "adapter.safetensors")
    parts = ("", "reference.", *(f"optimizer.state.{name}." for name in STATES))
    stored = DistributedCheckpoint(trained / "checkpoint").shapes
    assert stored.keys() == {f"{part}adapters.{name}" for part in parts for name in factors}
    other = str(adapted / "deepseek-some")  # of the same shapes
    run_ranks(HERE, 1, "lora_training.py", "refused", other, str(trained))
    another_model, whole_weights = (trained / "refused.txt").read_text().splitlines()
    assert "holds adapters of another model" in another_model and "model.path" in another_model
    assert "holds adapters (model.lora), and the recipe trains whole weights" in whole_weights
    hf_config = read_hf_config(adapted / MODEL)
    with pytest.raises(UserError, match=r"model\.lora.*, not a model; take .* hf/"):
        MegatronWeights(trained / "checkpoint", hf_config)


@pytest.mark.slow
def test_a_critic_is_trained_and_stored_whole(adapted, tmp_path):
    output = run_ranks(HERE, 1, "lora_training.py", "critic", str(adapted / MODEL), str(tmp_path))
    found = [float(x.split()[1]) for x in output.splitlines() if x.startswith("difference")]
    assert found == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (2, ["dp2", "tp2", "pp2", "ep2", "cp2", "pp2xvp2"]),
        (4, ["tp2xep2", "tp2xetp2", "pp2xep2"]),
    ],
)
def test_training_does_not_depend_on_the_layout(adapted, trained, world_size, grids):
    # Each grid also continues from the checkpoint that the grid before it wrote.
    run_ranks(HERE, world_size, "lora_training.py", str(adapted / MODEL), str(trained), *grids)
    expected = json.loads((trained / "one.json").read_text())
    assert expected["next rollout"]["kl"] > 1e-2, "the reference has to differ from the policy here"
    merged, start = (
        load_file(path)
        for path in (trained / "one.safetensors", adapted / MODEL / "model.safetensors")
    )
    moved = {name for name in start if not torch.equal(merged[name], start[name])}
    assert moved == {name for name in start if is_adapted(name, None)}
    most = max((merged[name] - start[name]).abs().max().item() for name in moved)
    for grid in grids:
        report = json.loads((trained / f"{grid}.json").read_text())
        for part, metrics in expected.items():
            assert_close(report[part], metrics, f"{grid} {part}")
        assert_close(
            report["continued"], expected["next rollout"], f"{grid} from another's checkpoint"
        )
        for name, tensor in load_file(trained / f"{grid}.safetensors").items():
            gap = (tensor - merged[name]).abs().max().item()
            assert gap <= TOLERANCE * most, f"{grid} {name}: {gap}, updates moved up to {most}"


@pytest.mark.more
def test_peft_loads_the_adapters(adapted, tmp_path):
    pytest.importorskip("peft", reason="make test-packages")
    names = ["qwen-some", "qwen-all", "deepseek-some"]
    run_ranks(HERE, 1, "lora_steps.py", str(adapted), str(tmp_path), "+".join(names), "one")
    output = run_script(HERE, ["lora_peft.py", str(adapted), str(tmp_path), *names])
    found = {
        line[0]: (int(line[1]), float(line[2]))
        for line in map(str.split, output.splitlines())
        if len(line) == 3 and line[0] in names
    }
    assert found.keys() == set(names), output
    for name, (num_factors, gap) in found.items():
        assert num_factors > 0 and gap < 2e-5, name
