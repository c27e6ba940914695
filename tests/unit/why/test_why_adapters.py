"""Adapters in transformers' models, against weights that have their products added."""

import pytest
import torch
from test_expert_replay import random_model, random_row

from megatron_r1.models.weights.adapter_table import A, B
from megatron_r1.why.policy.token_logprobs import token_logits
from megatron_r1.why.policy.transformers_adapters import (
    LowRankProducts,
    attach_transformers_adapters,
    merge_adapters,
    merged_weights,
    trained_parameters,
    with_scale,
)

RANK, SCALE = 2, 1.5
MLP = ("gate_proj", "up_proj", "down_proj")
SHARED = [f"model.layers.1.mlp.shared_experts.{name}" for name in MLP]
ATTENTION = ["model.layers.0.self_attn.q_b_proj", "model.layers.1.self_attn.o_proj"]
EXPERTS = [f"model.layers.0.mlp.experts.{e}.{name}" for e in range(8) for name in MLP[1:]]


def factors_of(model, layers) -> dict[str, torch.Tensor]:
    factors = {}
    for layer in layers:
        stack, _, name = layer.partition(".experts.")
        if name:
            weight = getattr(
                model.get_submodule(f"{stack}.experts"),
                "down_proj" if name.endswith("down_proj") else "gate_up_proj",
            )[0]
            rows = len(weight) if name.endswith("down_proj") else len(weight) // 2
            shape = rows, weight.shape[1]
        else:
            shape = model.get_submodule(layer).weight.shape
        factors[layer + A] = torch.randn(RANK, shape[1])
        factors[layer + B] = torch.randn(shape[0], RANK) * 0.1
    return factors


def add_products(model, factors) -> None:
    with torch.no_grad():
        for layer in {name.removesuffix(A) for name in factors if name.endswith(A)}:
            product = SCALE * factors[layer + B] @ factors[layer + A]
            stack, _, name = layer.partition(".experts.")
            if not name:
                model.get_submodule(layer).weight += product
                continue
            experts, (number, projection) = model.get_submodule(f"{stack}.experts"), name.split(".")
            if projection == "down_proj":
                experts.down_proj[int(number)] += product
            else:
                first = 0 if projection == "gate_proj" else len(product)
                experts.gate_up_proj[int(number)][first : first + len(product)] += product


@pytest.mark.parametrize("layers", [ATTENTION, SHARED, EXPERTS, ATTENTION + SHARED + EXPERTS])
def test_a_model_with_adapters_is_that_with_their_products(layers):
    model, expected = random_model("DeepseekV3"), random_model("DeepseekV3")
    factors = factors_of(model, layers)
    add_products(expected, factors)
    attach_transformers_adapters(model, list(factors), factors.__getitem__, SCALE)
    ids = torch.randint(23, (2, 9))
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    weights = merged_weights(model)
    assert weights.keys() == expected.state_dict().keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-6)


def test_another_scale_is_that_of_smaller_products():
    model, expected = random_model("DeepseekV3"), random_model("DeepseekV3")
    layers = ATTENTION + EXPERTS
    factors = factors_of(model, layers)
    smaller = {name: value / 3 if name.endswith(B) else value for name, value in factors.items()}
    assert with_scale(model, SCALE) is None
    attach_transformers_adapters(model, list(factors), factors.__getitem__, SCALE)
    add_products(expected, smaller)
    ids = torch.randint(23, (2, 9))
    before = model(ids).logits
    torch.testing.assert_close(
        with_scale(model, SCALE / 3)(ids).logits, expected(ids).logits, rtol=0, atol=1e-5
    )
    assert torch.equal(model(ids).logits, before)


def test_a_forward_pass_adds_the_products_once(monkeypatch):
    """Transformers reads an expert's slice of the stacked weights at a time."""
    model, num_calls = random_model("DeepseekV3"), 0
    factors = factors_of(model, EXPERTS)
    attach_transformers_adapters(model, list(factors), factors.__getitem__, SCALE)
    forward = LowRankProducts.forward

    def count(self, weight):
        nonlocal num_calls
        num_calls += 1
        return forward(self, weight)

    monkeypatch.setattr(LowRankProducts, "forward", count)
    token_logits(model, [random_row(9)])[0].sum().backward()
    assert num_calls == 2  # gate and up, and down
    assert all(value.grad is not None for value in trained_parameters(model).values())


def test_only_the_factors_are_trained_with_the_gradients_of_the_product():
    model, whole = random_model("DeepseekV3"), random_model("DeepseekV3")
    factors = factors_of(model, ATTENTION)
    add_products(whole, factors)
    attach_transformers_adapters(model, list(factors), factors.__getitem__, SCALE)
    ids = torch.randint(23, (2, 9))
    for each_model in (model, whole):
        each_model(ids).logits.square().sum().backward()
    gradients = {name: value.grad for name, value in trained_parameters(model).items()}
    assert len(gradients) == len(factors)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for layer in ATTENTION:
        of_weight = whole.get_submodule(layer).weight.grad
        prefix = f"{layer}.parametrizations.weight.0"
        expected = {
            f"{prefix}.a.0": SCALE * factors[layer + B].T @ of_weight,
            f"{prefix}.b.0": SCALE * of_weight @ factors[layer + A].T,
        }
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-3)


def test_weights_that_are_exported_have_the_products():
    model, expected = random_model("DeepseekV3"), random_model("DeepseekV3")
    layers = ATTENTION + SHARED
    factors = factors_of(model, layers)
    add_products(expected, factors)
    tensors = dict(model.state_dict())
    merge_adapters(tensors, factors, SCALE)
    for layer in layers:
        assert not torch.equal(tensors[f"{layer}.weight"], model.state_dict()[f"{layer}.weight"])
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-6)
