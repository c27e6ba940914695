"""How new weights get to the engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section


class PushConfig(Section):
    transport: Literal["shm", "gloo", "nccl"] = Field(
        "shm",
        description="shm: trainer and engines on one host; gloo, nccl: on many. See docs/push.md",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="host memory an engine rank may use for weights on their way; with less than "
        "all its weights engines pause while they travel; default: as much as they have",
    )
    timeout_seconds: float = Field(600.0, gt=0, description="for one push")
    probes: int = Field(
        2,
        ge=0,
        description="prompts each engine answers after every push, to compare its "
        "log-probabilities with the trainer's; 0: none",
    )
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="mean difference at which the run stops; default 0.001 where trainer and "
        "engine compute in float32, 0.3 in bfloat16",
    )
