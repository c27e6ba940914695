"""The train step: optimizer, parallel layout, supervised data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.config.section import Section


class OptimizerConfig(Section):
    learning_rate: float = Field(3e-6, gt=0)
    min_learning_rate: float = Field(0.0, ge=0, description="at the end of the decay")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = "constant"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm")


class ParallelConfig(Section):
    processes: int = Field(
        1, ge=1, description="trainer ranks started on this machine; under torchrun: WORLD_SIZE"
    )
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    expert_tensor: int = Field(1, ge=1)
    tokens_per_microbatch: int = Field(
        16_384, gt=0, description="upper limit; a longer sample gets a micro-batch alone"
    )
    threads: int | None = Field(
        None, description="CPU threads per trainer rank; default: cores / ranks"
    )

    def check_sizes(self, world_size: int) -> None:
        """Raises ValueError where the sizes do not divide `world_size` ranks."""
        groups = {
            "tensor x pipeline x context": self.tensor * self.pipeline * self.context,
            "expert_tensor x expert x pipeline": self.expert_tensor * self.expert * self.pipeline,
        }
        for sizes, product in groups.items():
            if world_size % product:
                raise ValueError(
                    f"parallel: {world_size} trainer ranks cannot be divided into groups of "
                    f"{product} ({sizes}); change parallel.processes or the sizes"
                )

    @model_validator(mode="after")
    def _sizes(self):
        if self.context > 1:
            raise ValueError("parallel.context: context parallelism is not supported yet; use 1")
        return self


class SFTConfig(Section):
    data: str = Field("", description="JSONL of {prompt, response}; required by sft")
    batch_size: int = Field(128, gt=0, description="samples per optimizer step")
    order: Literal["shuffled", "file"] = Field(
        "shuffled", description="file: as they stand there, for a curriculum"
    )
