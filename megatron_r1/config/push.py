"""Settings of the weight push from trainer to engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_r1.config.section import Resumable, Section
from megatron_r1.errors import Cause, UserError


class PushConfig(Section):
    """How weights travel to the engines, and how each push is verified."""

    transport: Resumable[Literal["shm", "cuda_ipc", "gloo", "nccl"]] = "shm"
    """shm, or cuda_ipc between GPUs, if all ranks are on one host; gloo or nccl for many hosts. See
    docs/push.md"""
    memory_gib: Resumable[float | None] = Field(None, gt=0)
    """memory an engine rank may use for weights on their way; if that is less than all its weights,
    engines pause while they travel; default: as much as the weights have"""
    fp8: bool = False
    """quantize projections on their way, in blocks of 128 x 128: half of bf16's bytes, and engines
    compute with FP8 weights"""
    delta: Resumable[bool] = False
    """over gloo and nccl send only what changed since the push before; for slow links, at the cost
    of host memory for what was sent last. Every engine then gets it from the trainer, not from
    others"""
    full_every: Resumable[int] = Field(50, ge=1)
    """with delta: one of so many pushes to an engine is whole"""
    timeout_seconds: Resumable[float] = Field(600.0, gt=0)
    """limit for one push"""
    probes: Resumable[int] = Field(2, ge=0)
    """prompts each engine answers after every push, to compare its log-probabilities with the
    trainer's; 0: none"""
    probe_tolerance: Resumable[float | None] = Field(None, gt=0)
    """mean difference of these log-probabilities at which the run stops; default: 0.001 where
    trainer and engine compute in float32, 0.3 in bfloat16"""

    @model_validator(mode="after")
    def _delta_travels(self) -> Self:
        if self.delta and self.on_one_host:
            raise UserError(
                f"push.delta: with push.transport: {self.transport} nothing travels, weights are "
                "written to where they are wanted; set push.delta: false, or gloo or nccl",
                key="push.delta",
                cause=Cause.CONFLICT,
            )
        return self

    @property
    def on_one_host(self) -> bool:
        """Whether trainer ranks write into the memory of engine ranks on the same host."""
        return self.transport in ("shm", "cuda_ipc")
