"""Section `fp8`: FP8 products of the linear layers."""

from typing import Literal, Self

from pydantic import model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.section import Section


class FP8Config(Section):
    """FP8 products of the linear layers: kind of scales and number formats."""

    recipe: Literal["none", "blockwise", "tensorwise", "mxfp8"] = "none"
    """how the linear layers' products are scaled; blockwise: DeepSeek-V3's. See docs/fp8.md"""
    format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: output gradients in e5m2; default: e4m3, for tensorwise hybrid"""
    scales: Literal["power_of_two", "float32"] | None = None
    """values of a tile's scale; default: power_of_two, for tensorwise float32"""

    @property
    def gradient_format(self) -> str:
        """The format that output gradients are rounded to: e4m3 or e5m2."""
        fp8_format = self.format or ("hybrid" if self.recipe == "tensorwise" else "e4m3")
        return "e5m2" if fp8_format == "hybrid" else "e4m3"

    @property
    def scale_kind(self) -> str:
        """The values that a tile's scale may have: power_of_two or float32."""
        return self.scales or ("float32" if self.recipe == "tensorwise" else "power_of_two")

    @model_validator(mode="after")
    def _scales_of_recipe(self) -> Self:
        if self.recipe == "mxfp8" and self.scales == "float32":
            raise UserError(
                "fp8.scales: float32 is not possible with fp8.recipe mxfp8, whose scales are "
                "powers of two by definition; use power_of_two, or fp8.recipe blockwise",
                key="fp8.scales",
                cause=Cause.CONFLICT,
            )
        return self
