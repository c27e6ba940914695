"""Reads a checkpoint at any parallel layout, after all ranks together have verified it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_r1.training.checkpoints import contents, manifest
from megatron_r1.training.checkpoints.contents import Chunks
from megatron_r1.training.checkpoints.manifest import BadManifest, Verify
from megatron_r1.training.reference import Reference

if TYPE_CHECKING:
    from megatron_r1.training.critic import Critic  # whose construction reads checkpoints

UNREADABLE = (
    *(KeyError, RuntimeError, ValueError, OSError, EOFError, UnpicklingError),
    *(CheckpointingException, CheckpointException),
)
"""What Megatron and torch raise where names, shapes or bytes are not as they expect."""


def damage(folder: Path, verify: Verify) -> list[str]:
    """What is wrong with `folder`, on every rank the same; each rank reads its share of the bytes.

    Called on all ranks together.
    """
    found: list[str] = []
    if verify != "none":
        try:
            entries = manifest.read(folder)
            share = manifest.share(entries, dist.get_rank(), dist.get_world_size())
            found = manifest.damage(folder, verify, share)
        except BadManifest as error:
            found = [str(error)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return sorted({fault for faults in everyone for fault in faults})


def load(
    folder: Path,
    chunks: Chunks,
    optimizer: Any,
    reference: Reference | None,
    critic: Critic | None = None,
) -> bool:
    """Read `folder` into the model, the optimizer, the reference, the critic and, at the layout
    that wrote it, every rank's random streams. Returns whether the streams were there.

    Raises ValueError, naming the folder, when its tensors do not fit the model.
    """
    wanted = contents.sharded(chunks, optimizer, reference, critic)
    try:
        written_by = dist_checkpointing.load_common_state_dict(str(folder)).get("layout")
        is_same_layout = written_by == contents.layout(chunks)
        if is_same_layout:
            wanted["rng"] = contents.rng_entry(loading=True)
        found = dist_checkpointing.load(wanted, str(folder))
    except UNREADABLE as error:
        cause = str(error).strip().splitlines()[-1].strip()  # the first lines are a traceback
        raise ValueError(
            f"checkpoint {folder} does not fit this model and recipe ({cause[:300]}); "
            "continue with the recipe that wrote it, or start in another run.folder"
        ) from error
    contents.put_back(found, chunks, optimizer, reference, critic)
    if is_same_layout:
        contents.put_back_rng(found["rng"])
    return is_same_layout
