"""Section `model`: the policy that is trained, and its low-rank adapters."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.section import Resumable, Section

Fusion = Literal["gradient_accumulation", "activation", "permute"]


class LoraConfig(Section):
    """Low-rank adapters in place of the model's own weights (arXiv 2106.09685): docs/lora.md."""

    rank: int = Field(16, ge=1)
    """rows of the factor A, columns of the factor B"""
    alpha: float = Field(32.0, gt=0)
    """W + alpha / rank x B A replaces a weight W"""
    targets: list[str] | None = Field(None, min_length=1)
    """linear layers with an adapter, by the ending of their Hugging Face name without an expert's
    number: q_proj, mlp.down_proj, experts.up_proj; default: all but routers and head"""

    @property
    def scale(self) -> float:
        """The factor of the product of B and A: alpha / rank."""
        return self.alpha / self.rank


class ModelConfig(Section):
    """The weights to start from, their head and dtype, and where a run differs from config.json."""

    path: str = ""
    """Hugging Face folder: config, tokenizer, weights; required"""
    checkpoint: str | None = None
    """Megatron checkpoint (of megatron-r1 convert or a run) whose weights are taken, not path's"""
    head: Literal["language", "score"] = "language"
    """score: one number per token instead of logits; reward-model sets it"""
    init: Literal["load", "random"] = "load"
    """random: train from nothing; the folder needs no weights"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of random weights"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of trained parameters"""
    attention_backend: Resumable[Literal["auto", "flash", "fused", "unfused"]] = "auto"
    """of Transformer Engine on GPUs: flash-attn, cuDNN, plain products, or whichever fits"""
    fusions: Resumable[list[Fusion] | None] = None
    """operations in one CUDA kernel: a weight's gradient with its sum, SwiGLU, sorting of tokens by
    expert; default: on a GPU gradient_accumulation and permute"""
    mtp: Literal["frozen", "train", "none"] = "frozen"
    """multi-token-prediction layers: carried unchanged; trained, in sft with the model, in rl
    next to it, by losses that change nothing else; or left out"""
    expert_bias_update_rate: float = Field(0.0, ge=0)
    """step of the router's aux-loss-free bias, per optimizer step; 0: frozen"""
    lora: LoraConfig | None = None
    """train low-rank adapters, and leave the model's weights as they are; see docs/lora.md"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        is_set_by_name = {
            "init: random": self.init == "random",
            "head: score": self.head == "score",
            "mtp: train": self.mtp == "train",
            "expert_bias_update_rate": self.expert_bias_update_rate > 0,
        }
        if self.lora is not None and any(is_set_by_name.values()):
            setting = next(name for name, is_set in is_set_by_name.items() if is_set)
            raise UserError(
                f"model.lora: adapters of a loaded language model are all that is trained with it; "
                f"leave out model.lora or model.{setting}",
                key="model.lora",
                cause=Cause.CONFLICT,
            )
        if self.checkpoint and self.init == "random":
            raise UserError(
                f"model.checkpoint: {self.checkpoint} would not be read with model.init: random; "
                "set model.init to load, or leave model.checkpoint out",
                key="model.checkpoint",
                cause=Cause.CONFLICT,
            )
        return self

    def require_language_head(self) -> None:
        """Refuse a score model, for verbs that sample or train on tokens.

        Raises:
            UserError: model.head is not `language`.
        """
        if self.head != "language":
            raise UserError(
                f"model.head: {self.head} is for the verb reward-model; leave it out here",
                key="model.head",
                cause=Cause.CONFLICT,
            )
