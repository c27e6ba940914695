"""Section `checkpoint`: when the state of a run is saved, and what is kept."""

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section


class CheckpointConfig(Section):
    """When checkpoints are written, how many are kept, and how they are verified."""

    every: int = Field(1, ge=1)
    """steps between checkpoints; a kill loses at most these, and those since the checkpoint that
    was still being written"""
    keep: int = Field(2, ge=1)
    """newest checkpoints kept"""
    keep_every: int | None = Field(None, ge=1)
    """keep also those of steps that this divides; null: none"""
    asynchronous: bool = True
    """train on while one is written, and hold the host memory for its copy"""
    verify: Literal["full", "size", "none"] = "full"
    """what is checked before loading: checksum of every byte, sizes only, or nothing"""
