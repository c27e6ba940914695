"""Over which ranks gradients are summed, and which of them the norm counts."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.models import platform

platform.prepare_process()

from megatron_r1.models import gradients  # noqa: E402


def model(*names):
    """A module with one parameter of each dotted name."""
    root = torch.nn.Module()
    for name in names:
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(1)))
    return root


def config(**settings):
    sizes = {"expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 1}
    return SimpleNamespace(**{"num_moe_experts": 4, "sequence_parallel": False} | sizes | settings)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_a_parameter_that_every_rank_applies_to_its_own_tokens_is_summed(by_sequence):
    parameter = torch.nn.Parameter(torch.zeros(1))
    gradients.mark_sequence_parallel(parameter, config(sequence_parallel=by_sequence))
    assert parameter.sequence_parallel is by_sequence


@pytest.mark.parametrize(("tensor", "expert_tensor"), [(1, 1), (2, 1), (2, 2), (1, 2)])
def test_the_bias_of_experts_that_are_divided_otherwise_is_not_summed_twice(tensor, expert_tensor):
    built = model("layers.mlp.experts.linear_fc2.bias", "layers.mlp.router.bias")
    expert, router = built.layers.mlp.experts.linear_fc2.bias, built.layers.mlp.router.bias
    expert.sequence_parallel = router.sequence_parallel = True
    sizes = {"tensor_model_parallel_size": tensor, "expert_tensor_parallel_size": expert_tensor}
    gradients.correct_attributes(built, config(**sizes))
    assert expert.sequence_parallel is (tensor == expert_tensor)
    assert router.sequence_parallel is True


def test_softmax_offsets_of_every_tensor_rank_are_counted():
    built = model("layers.core_attention.softmax_offset")
    gradients.correct_attributes(built, config())
    assert built.layers.core_attention.softmax_offset.tensor_model_parallel is True


@pytest.mark.parametrize("counts", [False, True])
def test_an_adapters_factor_is_summed_as_its_weight(counts):
    weight, factor = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    weight.allreduce = False
    gradients.copy_gradient_attributes(factor, weight, counts)
    assert (factor.allreduce, factor.tensor_model_parallel) == (False, counts)
    gradients.copy_gradient_attributes(factor, torch.nn.Parameter(torch.zeros(1)), counts)
    assert factor.allreduce is True
