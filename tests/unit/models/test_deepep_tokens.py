"""Tokens that DeepEP brings, selected without masks, against Megatron's own."""

from types import SimpleNamespace

import torch

from megatron_r1.models import platform

platform.prepare_process()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402

from megatron_r1.models.token_dispatcher import indices_to_multihot  # noqa: E402

MEGATRON = token_dispatcher._DeepepManager._indices_to_multihot


def test_selected_tokens_weights_and_gradients_are_megatrons():
    assert MEGATRON is not indices_to_multihot, "the module was patched before this test"
    manager = SimpleNamespace(num_local_experts=5)
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(11)])
    indices = torch.where(indices < 5, indices, -1)
    indices[4] = -1
    probs = torch.rand(11, 3)
    found = []
    for function in (MEGATRON, indices_to_multihot):
        given = probs.clone().requires_grad_()
        chosen, weights = function(manager, indices, given)
        (weights * torch.arange(55.0).view(11, 5)).sum().backward()
        found.append((chosen, weights, given.grad))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
