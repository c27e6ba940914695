"""Settings of the train step: optimizer, FP8, supervised data."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_r1.config.mixture import MixturePart, read_parts
from megatron_r1.config.section import Section


class OptimizerConfig(Section):
    """Adam, its learning rate over the run, and the memory of its state."""

    learning_rate: float = Field(3e-6, gt=0, description="after warm-up (the paper: 3e-6)")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate falls after warm-up, to min_learning_rate at the end of the run"""
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the gradient's mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the gradient's square")
    epsilon: float = Field(1e-8, gt=0, description="Adam's, added to the root of the square")
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's: a step takes learning rate x this of a weight; 0: none"""
    clip_grad: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    moments: Literal["float32", "bfloat16"] = "float32"
    """dtype of Adam's moments; bfloat16: DeepSeek-V3's, 4 bytes a parameter less"""


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
        chosen = self.format or ("hybrid" if self.recipe == "tensorwise" else "e4m3")
        return "e5m2" if chosen == "hybrid" else "e4m3"

    @property
    def scale_kind(self) -> str:
        """The values that a tile's scale may have: power_of_two or float32."""
        return self.scales or ("float32" if self.recipe == "tensorwise" else "power_of_two")

    @model_validator(mode="after")
    def _scales_of_recipe(self) -> Self:
        if self.recipe == "mxfp8" and self.scales == "float32":
            raise ValueError(
                "fp8.scales: float32 is not possible with fp8.recipe mxfp8, whose scales are "
                "powers of two by definition; use power_of_two, or fp8.recipe blockwise"
            )
        return self


class SFTConfig(Section):
    """Supervised data: files, epochs and batches."""

    data: str | list[MixturePart] = ""
    """JSONL of {prompt, response}, or a list of {path, share|count|repeat}; required by sft"""
    epochs: float | None = Field(None, gt=0)
    """instead of run.steps: passes over the data (the paper: 2)"""
    batch_size: int = Field(128, gt=0, description="samples per optimizer step")
    order: Literal["shuffled", "file"] = "shuffled"
    """file: samples in the order of the file, for a curriculum"""

    @field_validator("data", mode="before")
    @classmethod
    def _parts(cls, data: Any) -> Any:
        return read_parts(data) if isinstance(data, list) else data
