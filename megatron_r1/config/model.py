"""The model that a run trains."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_r1.config.lora import LoraConfig
from megatron_r1.config.section import Resumable, Section
from megatron_r1.errors import UserError

Fusion = Literal["gradient_accumulation", "activation", "permute"]


class ModelConfig(Section):
    """The weights to start from, their head and dtype, and where a run differs from config.json."""

    path: str = Field("", description="Hugging Face folder: config, tokenizer, weights; required")
    checkpoint: str | None = None
    """Megatron checkpoint (of tools/convert or a run) whose weights are taken, not path's"""
    head: Literal["language", "score"] = "language"
    """score: one number per token instead of logits; reward-model sets it"""
    init: Literal["load", "random"] = "load"
    """random: train from nothing; the folder needs no weights"""
    init_std: float = Field(0.02, gt=0, description="standard deviation of random weights")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of trained parameters"""
    attention_backend: Resumable[Literal["auto", "flash", "fused", "unfused"]] = "auto"
    """of Transformer Engine on GPUs: flash-attn, cuDNN, plain products, or whichever fits"""
    fusions: Resumable[list[Fusion] | None] = None
    """operations in one CUDA kernel: a weight's gradient with its sum, SwiGLU, sorting of tokens by
    expert; default: on a GPU gradient_accumulation and permute"""
    mtp: Literal["frozen", "train", "none"] = "frozen"
    """multi-token-prediction layers: carried unchanged; trained, in sft with the model, in rl
    beside it, by losses that change nothing else; or left out"""
    expert_bias_update_rate: float = Field(0.0, ge=0)
    """step of the router's aux-loss-free bias, per optimizer step; 0: frozen"""
    lora: LoraConfig | None = None
    """train low-rank adapters, and leave the model's weights as they are; see docs/lora.md"""

    @model_validator(mode="after")
    def _adapters_alone_are_trained(self) -> Self:
        others = {
            "init: random": self.init == "random",
            "head: score": self.head == "score",
            "mtp: train": self.mtp == "train",
            "expert_bias_update_rate": self.expert_bias_update_rate > 0,
        }
        if self.lora is not None and any(others.values()):
            other = next(name for name, is_set in others.items() if is_set)
            raise ValueError(
                f"model.lora: adapters of a loaded language model are all that is trained with it; "
                f"leave out model.lora or model.{other}"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_loaded_or_random(self) -> Self:
        if self.checkpoint and self.init == "random":
            raise ValueError(
                f"model.checkpoint: {self.checkpoint} would not be read with model.init: random; "
                "set model.init to load, or leave model.checkpoint out"
            )
        return self

    def require_language_head(self) -> None:
        """Raise UserError for a model with a score head."""
        if self.head != "language":
            raise UserError(
                f"model.head: {self.head} is for the verb reward-model; leave it out here"
            )
