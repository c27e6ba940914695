"""Whether this GPU, CUDA and Transformer Engine can run `fp8.recipe`, and what Megatron gets."""

from typing import Any

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import FP8Config

_FP8_SWITCHES = {
    "blockwise": ("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "float32"),
    "tensorwise": ("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "power_of_two"),
}
"""The environment variable that Transformer Engine reads when it is imported, and the kind of scale
that 1 selects. Neither it nor Megatron has another way to set the kind."""


def transformer_engine_fp8_fields(fp8: FP8Config) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig for `fp8.recipe`, which must not be "none".

    Raises:
        UserError: this GPU, CUDA or Transformer Engine cannot run the recipe.
    """
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    check_fp8_device(fp8, torch.cuda.get_device_capability(), cuda)
    _check_fp8_recipe(fp8)
    return {
        "fp8": "hybrid" if fp8.gradient_format == "e5m2" else "e4m3",
        "fp8_recipe": fp8.recipe,
        # Without it, experts' tokens are padded with zeros around the grouped product, which does
        # not change results; with it, an expert gets tokens that were not routed to it.
        "moe_router_padding_for_quantization": False,
    }


def check_fp8_device(fp8: FP8Config, capability: tuple[int, int], cuda: tuple[int, ...]) -> None:
    """Raise UserError for a GPU or CUDA that Transformer Engine would refuse at the first product
    (transformer_engine/pytorch/quantization.py), and for scales that it lacks there.

    Args:
        fp8: the recipe's section.
        capability: (major, minor) compute capability of the GPU.
        cuda: the version of CUDA that torch was built with."""
    device = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if fp8.recipe == "blockwise" and (capability < (9, 0) or cuda < (12, 9)):
        raise UserError(
            f"fp8.recipe=blockwise needs compute capability 9.0 (Hopper) and CUDA 12.9 or newer; "
            f"{device}, CUDA is {'.'.join(map(str, cuda))}. Use fp8.recipe=tensorwise or none",
            key="fp8.recipe",
            cause=Cause.UNSUPPORTED,
        )
    if fp8.recipe == "tensorwise" and capability < (8, 9):
        raise UserError(
            f"fp8.recipe=tensorwise needs compute capability 8.9 (Ada) or newer; {device}. "
            "Use fp8.recipe=none",
            key="fp8.recipe",
            cause=Cause.UNSUPPORTED,
        )
    if fp8.recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        raise UserError(
            f"fp8.recipe=mxfp8 needs compute capability 10.x (Blackwell); {device}. "
            "Use fp8.recipe=blockwise on Hopper, tensorwise elsewhere",
            key="fp8.recipe",
            cause=Cause.UNSUPPORTED,
        )
    if fp8.recipe == "blockwise" and fp8.scale_kind == "float32" and capability >= (10, 0):
        raise UserError(
            f"fp8.scales=float32 with fp8.recipe=blockwise needs Hopper; {device}, where "
            "Transformer Engine computes blocks as MXFP8. Use power_of_two",
            key="fp8.scales",
            cause=Cause.UNSUPPORTED,
        )


def _check_fp8_recipe(fp8: FP8Config) -> None:
    try:
        from transformer_engine.common import recipe
    except ImportError:
        raise UserError(
            f"fp8.recipe={fp8.recipe} needs Transformer Engine, which does not import here; "
            "install it (docs/gpu.md; in a checkout: make setup-cuda), or use fp8.recipe=none",
            key="fp8.recipe",
            cause=Cause.NOT_INSTALLED,
        ) from None
    names = {
        "blockwise": "Float8BlockScaling",
        "tensorwise": "Float8CurrentScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    recipe_class = getattr(recipe, names[fp8.recipe], None)
    if recipe_class is None:
        raise UserError(
            f"fp8.recipe={fp8.recipe} needs a newer Transformer Engine: this one has no "
            f"{names[fp8.recipe]} (2.3 has all of them)",
            key="fp8.recipe",
            cause=Cause.NOT_INSTALLED,
        )
    if fp8.recipe in _FP8_SWITCHES:
        variable, kind = _FP8_SWITCHES[fp8.recipe]
        power_of_two = recipe_class().fp8_quant_fwd_inp.power_2_scale
        if power_of_two != (fp8.scale_kind == "power_of_two"):
            value = int(fp8.scale_kind == kind)
            raise UserError(
                f"fp8.scales={fp8.scale_kind} is set by the environment for Transformer Engine: "
                f"start the trainer with {variable}={value}",
                key="fp8.scales",
                cause=Cause.CONFLICT,
            )
