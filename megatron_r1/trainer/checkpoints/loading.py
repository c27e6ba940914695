"""Reads a checkpoint at any parallel layout, after all ranks together have verified it."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.trainer.checkpoints import contents, manifest
from megatron_r1.trainer.checkpoints.adapters import BASE, check_base
from megatron_r1.trainer.checkpoints.contents import REFERENCE, Networks
from megatron_r1.trainer.checkpoints.manifest import BadManifest, Verify

UNREADABLE = (
    *(KeyError, RuntimeError, ValueError, OSError, EOFError, UnpicklingError),
    *(CheckpointingException, CheckpointException),
)
"""Errors of Megatron and torch for unexpected names, shapes or bytes."""


def damage(folder: Path, verify: Verify) -> list[str]:
    """Return the faults of `folder`, one line per file, the same on every rank.

    Called on all ranks together; each reads its share of the bytes."""
    faults: list[str] = []
    if verify != "none":
        try:
            entries = manifest.read(folder)
            share = manifest.share(entries, dist.get_rank(), dist.get_world_size())
            faults = manifest.damage(folder, verify, share)
        except BadManifest as error:
            faults = [str(error)]
    from_all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(from_all_ranks, faults)  # over all ranks: all refuse, or none
    return sorted({fault for faults in from_all_ranks for fault in faults})


def load(folder: Path, networks: Networks) -> bool:
    """Read `folder` into `networks` and, at the layout that wrote it, every rank's random streams.

    Returns whether the streams were restored. Raises UserError, naming the folder, when its tensors
    do not fit the model."""
    tree = contents.sharded(networks)
    own_layout = contents.layout(networks.policy.chunks)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        check_base(folder, common.get(BASE), networks.policy.chunks)
        written_by = common.get("layout")
        if written_by == own_layout:
            tree["rng"] = contents.rng_entry(loading=True)
        loaded = dist_checkpointing.load(tree, str(folder))
    except UserError:
        raise
    except UNREADABLE as error:
        _check_reference(folder, networks)
        # The first lines are a traceback; an EOFError has no text.
        cause = (str(error).strip().splitlines() or [repr(error)])[-1].strip()
        raise UserError(
            f"checkpoint {folder} does not fit this model and recipe ({cause[:300]}); "
            "continue with the recipe that wrote it, or start in another run.folder",
            key="checkpoint",
            cause=Cause.CHANGED,
        ) from error
    contents.restore(loaded, networks)
    if written_by == own_layout:
        contents.restore_rng(loaded["rng"])
    return written_by == own_layout


def _check_reference(folder: Path, networks: Networks) -> None:
    """Raise UserError where a reference is wanted that the checkpoint does not have."""
    names: Iterable[str] = (REFERENCE,)
    with contextlib.suppress(*UNREADABLE):
        names = dist_checkpointing.load_tensors_metadata(str(folder))
    if networks.reference is not None and not any(name.startswith(REFERENCE) for name in names):
        raise UserError(
            f"checkpoint {folder} has no reference policy: rl.kl_beta was 0 when the run began, "
            "and rl.schedule cannot add a KL penalty; leave it out, or start a new run with "
            "rl.kl_beta from the exported model",
            key="rl.kl_beta",
            cause=Cause.CHANGED,
        )
