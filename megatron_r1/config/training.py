"""Settings of the train step: optimizer, FP8, supervised data with the shares of its files."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.mistakes import refusal
from megatron_r1.config.section import Section


class OptimizerConfig(Section):
    """Adam, its learning rate over the run, and the memory of its state."""

    learning_rate: float = Field(3e-6, gt=0)
    """after warm-up (the paper: 3e-6)"""
    min_learning_rate: float = Field(0.0, ge=0)
    """learning rate at the end of the decay"""
    warmup: int = Field(0, ge=0)
    """optimizer steps of linear warm-up"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate falls after warm-up, to min_learning_rate at the end of the run"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay of the gradient's mean"""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's decay of the gradient's square"""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's, added to the root of the square"""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's: a step takes learning rate x this of a weight; 0: none"""
    clip_grad: float = Field(1.0, gt=0)
    """largest global norm of the gradient"""
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
            raise UserError(
                "fp8.scales: float32 is not possible with fp8.recipe mxfp8, whose scales are "
                "powers of two by definition; use power_of_two, or fp8.recipe blockwise",
                key="fp8.scales",
                cause=Cause.CONFLICT,
            )
        return self


class MixturePart(Section):
    """One file of a mixture. `share`, `count` and `repeat` exclude each other; without any of them
    the file is used once (`repeat: 1`)."""

    path: str = Field(min_length=1)
    """rows of {prompt, response}, {messages} and other forms: a file, a folder, hub:NAME. See
    docs/data.md"""
    share: float | None = Field(None, gt=0, le=1)
    """share of an epoch's examples that come from this file"""
    count: int | None = Field(None, gt=0)
    """how many of its examples an epoch has"""
    repeat: float | None = Field(None, gt=0)
    """how often an epoch has the whole file"""
    columns: dict[str, str] | None = None
    """{our name: the file's column}"""
    where: dict[str, Any] = Field(default_factory=dict)
    """{column: condition}, as data.where"""

    @model_validator(mode="after")
    def _is_sized_once(self) -> Self:
        sizes = {name: getattr(self, name) for name in ("share", "count", "repeat")}
        given = {name: size for name, size in sizes.items() if size is not None}
        if len(given) > 1:
            raise UserError(
                f"{self.path} has {given}: give one of share, count and repeat",
                key=list(given)[1],
                cause=Cause.CONFLICT,
            )
        return self


class SFTConfig(Section):
    """Supervised data: files, epochs and batches."""

    data: str | list[MixturePart] = ""
    """rows of {prompt, response}, {messages} and other forms (docs/data.md), or a list of {path,
    share|count|repeat}; required by sft"""
    template: str | None = None
    """how conversations are rendered: chat, or for one question plain or a text with {problem};
    default: chat where the tokenizer has a chat template"""
    epochs: float | None = Field(None, gt=0)
    """instead of run.steps: passes over the data (the paper: 2)"""
    batch_size: int = Field(128, gt=0)
    """samples per optimizer step"""
    order: Literal["shuffled", "file"] = "shuffled"
    """file: samples in the order of the file, for a curriculum"""

    @field_validator("data", mode="before")
    @classmethod
    def _parts(cls, data: Any) -> Any:
        return read_parts(data) if isinstance(data, list) else data


def read_parts(entries: list[Any]) -> list[MixturePart]:
    """Read `sft.data` given as a list.

    Raises UserError naming the entry, the key and the nearest right one, and for an empty list or
    shares that do not add up."""
    if not entries:
        raise UserError(
            "sft.data: the list is empty; give {path: …} entries, or one path",
            key="sft.data",
            cause=Cause.EMPTY,
        )
    parts = [_read_part(number, entry) for number, entry in enumerate(entries)]
    shares = [part.share for part in parts if part.share is not None]
    total, are_all = sum(shares), len(shares) == len(parts)
    if are_all and abs(total - 1) > 1e-6:
        raise UserError(
            f"sft.data: the shares {shares} add up to {total:g}; make that 1",
            key="sft.data",
            cause=Cause.CONFLICT,
        )
    if shares and not are_all and total >= 1:
        raise UserError(
            f"sft.data: the shares {shares} add up to {total:g}, which leaves nothing for the "
            "parts without one; lower them",
            key="sft.data",
            cause=Cause.CONFLICT,
        )
    return parts


def _read_part(number: int, entry: Any) -> MixturePart:
    place = f"sft.data.{number}"
    if isinstance(entry, MixturePart):
        return entry
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        raise UserError(
            f"{place}: must be a path or {{path, share|count|repeat}}, got {entry!r}",
            key=place,
            cause=Cause.MALFORMED,
        )
    try:
        return MixturePart.model_validate(entry)
    except ValidationError as failure:
        error = refusal(failure, MixturePart, place=place)
        error.key = f"{place}.{error.key}"
        raise error from None
