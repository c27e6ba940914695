"""Transformer Engine's linear layers with FP8 blocks on the null GPU, against the emulation of
`models.fp8` on the host: `blockwise_layers.py`. NVTE_FP8_BLOCK_SCALING_FP32_SCALES chooses the kind
of scales.

It prints the largest relative difference of results and gradients, and what rounding does."""

import os

import torch
import transformer_engine_on_host
from host_compute import compute_everywhere

from megatron_r1.config import FP8Config
from megatron_r1.models.fp8 import find_fp8_recipe
from megatron_r1.models.fp8_emulation import fp8_linear

SIZES = (256, 384)
TOKENS = (130, 0, 37)
"""Of each of three experts, padded as Megatron does."""


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


def emulated(x, gradient, weights, recipe) -> list[torch.Tensor]:
    """Return y, dx and the dW of every expert with tokens."""
    x = x.clone().requires_grad_()
    weights = [weight.detach().cpu().clone().requires_grad_() for weight in weights]
    parts = zip(x.split(TOKENS), weights, strict=True)
    y = torch.cat([fp8_linear(part, weight, recipe) for part, weight in parts])
    y.backward(gradient)
    return [y, x.grad, *(w.grad for w, tokens in zip(weights, TOKENS, strict=True) if tokens)]


def main() -> None:
    compute_everywhere()
    transformer_engine_on_host.install()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Format

    exact = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES") == "1"
    recipe = find_fp8_recipe(FP8Config(recipe="blockwise", scales="float32" if exact else None))
    torch.manual_seed(0)
    x = (torch.randn(sum(TOKENS), SIZES[0]) * torch.logspace(-2, 2, SIZES[0])).bfloat16()
    gradient = torch.randn(sum(TOKENS), SIZES[1]).bfloat16()
    options = {"bias": False, "params_dtype": torch.bfloat16}
    layer = te.GroupedLinear(len(TOKENS), *SIZES, **options)
    weights = [getattr(layer, f"weight{number}") for number in range(len(TOKENS))]
    on_gpu = x.cuda().requires_grad_()
    with te.autocast(enabled=True, recipe=Float8BlockScaling(fp8_format=Format.E4M3)):
        rows, padded = te.Fp8Padding(len(TOKENS))(on_gpu, list(TOKENS))
        y = te.Fp8Unpadding(len(TOKENS))(layer(rows, padded), list(TOKENS))
    y.backward(gradient.cuda())
    found = [y, on_gpu.grad, weights[0].grad, weights[2].grad]
    expected = emulated(x, gradient, weights, recipe)
    apart = max(distance(*pair) for pair in zip(found, expected, strict=True))
    plain = torch.cat(
        [
            part.float() @ weight.detach().cpu().float().T
            for part, weight in zip(x.split(TOKENS), weights, strict=True)
        ]
    )
    print(f"apart {apart:.2e}, rounding {distance(y, plain):.2e}")


if __name__ == "__main__":
    main()
