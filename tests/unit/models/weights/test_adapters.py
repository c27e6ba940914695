"""Adapters of layers as Transformer Engine has them, on GPUs only: with the norm inside, and with
all experts in one. tests/parallel/test_lora.py compares the others with transformers."""

from types import SimpleNamespace

import torch

from megatron_r1.models import platform

platform.prepare_process()

from megatron_r1.models.weights.adapter_module import (  # noqa: E402
    Adapter,
    add_product,
    add_products,
)
from megatron_r1.models.weights.layout import LayoutEntry  # noqa: E402
from megatron_r1.models.weights.splits import Piece  # noqa: E402

RANK, WIDTH, SCALE = 2, 5, 1.5
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def adapter(heights: dict[str, int]) -> Adapter:
    """Of a weight that stacks layers of these heights, on one rank."""
    of_a, of_b, end = [], [], 0
    for number, (name, height) in enumerate(heights.items()):
        of_a.append(Piece(f"{name}.lora_A.weight", 0, 0, number * RANK, RANK))
        of_b.append(Piece(f"{name}.lora_B.weight", 0, 0, end, height))
        end += height
    entries = [
        LayoutEntry(shape, tuple(pieces), True, True, False, None)
        for shape, pieces in (((RANK * len(heights), WIDTH), of_a), ((end, RANK), of_b))
    ]
    made = Adapter(tuple(entries), torch.zeros(end, WIDTH), SCALE, ALONE, by_sequence=False)
    torch.nn.init.normal_(made.a)
    torch.nn.init.normal_(made.b)
    return made


def product(of: Adapter, x: torch.Tensor, heights: list[int]) -> torch.Tensor:
    """By hand: scale x Aᵀ Bᵀ for each of the layers."""
    parts = zip(of.a.split(RANK), of.b.split(heights), strict=True)
    return torch.cat([SCALE * x @ a.T @ b.T for a, b in parts], -1)


def test_the_input_of_a_layer_with_its_norm_inside_is_normalized_first():
    own = adapter({"gate": 3, "up": 4})
    layer = SimpleNamespace(lora=own, layer_norm_weight=torch.randn(WIDTH), eps=1e-3)
    x, out = torch.randn(6, 1, WIDTH), torch.randn(6, 1, 7)
    normalized = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.layer_norm_weight
    got, bias = add_product(layer, (x,), (out, None))
    torch.testing.assert_close(got, out + product(own, normalized, [3, 4]))
    assert bias is None


def test_every_expert_of_a_layer_has_its_own_tokens():
    experts = [adapter({"down": 3}) for _ in range(3)]
    layer = SimpleNamespace(lora=experts)
    x, out = torch.randn(6, WIDTH), torch.randn(6, 3)
    got, _ = add_products(layer, (x, [4, 0, 2]), (out, None))
    torch.testing.assert_close(got[:4], out[:4] + product(experts[0], x[:4], [3]))
    torch.testing.assert_close(got[4:], out[4:] + product(experts[2], x[4:], [3]))
