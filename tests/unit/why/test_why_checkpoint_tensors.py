"""What `why` reads of checkpoints as they are: tensors that torch.distributed.checkpoint wrote."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_r1.why.policy import checkpoint_tensors

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
BIAS = "decoder.layers.1.mlp.router.expert_bias"
MASTER = "optimizer.state.param."
SECOND = "optimizer.state.exp_avg_sq."


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(12, 4, generator=draw)
    return {
        EMBEDDING: embedding,
        HEAD: embedding.clone(),
        BIAS: torch.zeros(4),
        f"{MASTER}{EMBEDDING}": embedding.clone(),
        f"{MASTER}{HEAD}": embedding.clone(),
        f"{SECOND}{EMBEDDING}": torch.ones(12, 4),
        f"{SECOND}{HEAD}": torch.ones(12, 4),
        f"reference.{EMBEDDING}": embedding.clone(),
    }


def written(folder, **changes: torch.Tensor):
    """A checkpoint; changes: tensors by the last part of their name."""
    names = {"head": HEAD, "bias": BIAS, "second": f"{SECOND}{HEAD}", "reference": "reference."}
    content = tensors()
    for name, change in changes.items():
        key = next(key for key in content if key.startswith(names[name]))
        content[key] = change
    dcp.save(content, checkpoint_id=folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


@pytest.fixture
def whole(tmp_path):
    return written(tmp_path / "whole")


def test_nothing_is_found_in_a_whole_checkpoint(whole):
    assert checkpoint_tensors.non_finite_tensor_names(whole) == []
    assert checkpoint_tensors.empty_moments(whole, "") == ([], 2)
    assert checkpoint_tensors.masters_apart(whole)[1] == 0.0
    assert checkpoint_tensors.head_from_embedding(whole) == 0.0
    assert checkpoint_tensors.find_largest_change(whole, whole, whole, False) == ("", 0.0, 0.0)


def test_a_number_that_is_not_finite_is_found(tmp_path):
    bad = torch.ones(12, 4)
    bad[3, 2] = float("inf")
    assert checkpoint_tensors.non_finite_tensor_names(written(tmp_path / "bad", second=bad)) == [
        f"{SECOND}{HEAD}"
    ]


def test_moments_that_are_all_zero_are_found(tmp_path):
    lost = written(tmp_path / "lost", second=torch.zeros(12, 4))
    found = checkpoint_tensors.empty_moments(lost, "")
    assert found == ([HEAD], 2)


def test_factors_of_a_layers_experts_count_as_one_and_those_of_a_may_be_left_out(tmp_path):
    prefix = f"{SECOND}adapters.model.layers.1.mlp.experts"
    content = {
        f"{prefix}.0.up_proj.lora_B.weight": torch.ones(4, 2),
        f"{prefix}.1.up_proj.lora_B.weight": torch.zeros(4, 2),  # it got no token
        f"{prefix}.0.up_proj.lora_A.weight": torch.zeros(2, 4),
        f"{prefix}.1.up_proj.lora_A.weight": torch.zeros(2, 4),
    }
    dcp.save(content, checkpoint_id=tmp_path / "adapters")
    (tmp_path / "adapters/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    empty, total = checkpoint_tensors.empty_moments(tmp_path / "adapters", "")
    assert (len(empty), total) == (1, 2) and empty[0].endswith("experts.up_proj.lora_A.weight")
    assert checkpoint_tensors.empty_moments(tmp_path / "adapters", ".lora_A.weight") == ([], 1)


def test_a_tied_head_that_is_another_tensor_is_found(tmp_path):
    lost = written(tmp_path / "lost", head=2 * tensors()[HEAD])
    assert checkpoint_tensors.head_from_embedding(lost) == pytest.approx(1.0)
    # Its master weights are those of before.
    name, distance = checkpoint_tensors.masters_apart(lost)
    assert name == HEAD and distance == pytest.approx(1.0)


def test_the_largest_change_and_the_norm_of_all_are_those_of_the_weights(whole, tmp_path):
    moved = tensors()[HEAD]
    moved[1, 1] += 0.5
    moved[2, 2] -= 0.25
    other = written(tmp_path / "other", head=moved, reference=torch.zeros(12, 4))
    name, largest, norm = checkpoint_tensors.find_largest_change(whole, other, whole, False)
    assert name == HEAD and largest == pytest.approx(0.5)
    assert norm == pytest.approx((0.5**2 + 0.25**2) ** 0.5)


def test_the_bias_of_a_router_may_move_by_its_own_rule(whole, tmp_path):
    other = written(tmp_path / "other", bias=torch.ones(4))
    assert checkpoint_tensors.find_largest_change(whole, other, whole, moves_bias=True)[1] == 0.0
    assert checkpoint_tensors.find_largest_change(whole, other, whole, moves_bias=False)[:2] == (
        BIAS,
        1.0,
    )
