"""Checkpoints of a run: Megatron's distributed checkpoint plus the run's own state, whole or not at
all.

    checkpoints/step_00000012/          one Megatron distributed checkpoint (torch_dist)
        run_state.json                  step, versions, sampler position: the controller's
Ranks write into a folder of another name; it gets its final name only when every file is on disk.
"""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_r1.files import fsync
from megatron_r1.training.reference import Reference

FORMAT = "fully_reshardable"
"""Of the distributed optimizer's state: whole moments per parameter, for any layout to load."""


def save(
    folder: Path,
    model: MegatronModule,
    optimizer: Any,
    reference: Reference | None,
    state: dict[str, Any],
) -> None:
    """Write `folder` atomically; on every rank together. `state` must be JSON."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Megatron would start a server process for results that never leave this one, and leave it
    # behind when this one ends.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_sharded(model, optimizer, reference, loading=False), str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / "run_state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        fsync(folder.parent)
    dist.barrier()


def load(folder: Path, model: MegatronModule, optimizer: Any, reference: Reference | None) -> None:
    """Read `folder` into the model, the optimizer and the reference, at any parallel layout.

    Raises ValueError, naming the folder, when its tensors do not fit the model.
    """
    wanted = _sharded(model, optimizer, reference, loading=True)
    try:
        found = dist_checkpointing.load(wanted, str(folder))
    except (
        KeyError,
        RuntimeError,
        ValueError,
        CheckpointingException,
        CheckpointException,
    ) as error:
        cause = str(error).strip().splitlines()[-1].strip()  # the first lines are a traceback
        raise ValueError(
            f"checkpoint {folder} does not fit this model and recipe ({cause[:300]}); "
            "continue with the recipe that wrote it, or start in another run.folder"
        ) from error
    model.load_state_dict(found["model"])
    for part, state in zip(_parts(optimizer), found["optimizer"], strict=True):
        whole = part.state_dict()
        for group in whole["optimizer"]["param_groups"]:
            group["step"] = found["optimizer_step"]
        part.load_state_dict({**whole, **state, "param_state_sharding_type": FORMAT})
    if reference is not None:
        kept = {name.removeprefix("reference."): t for name, t in found["reference"].items()}
        reference.load(model, kept)


def _sharded(model, optimizer, reference: Reference | None, loading: bool) -> dict[str, Any]:
    _allocate_state(optimizer)
    weights = _weights(model, "")
    kind = {"distrib_optim_sharding_type": FORMAT}
    states = [
        part.sharded_state_dict(weights, is_loading=loading, metadata=kind)
        for part in _parts(optimizer)
    ]
    # Megatron keeps experts' state in an optimizer of its own in some layouts and not in others,
    # and its chained state says so. Tensors are named by their parameter; the only other thing that
    # has to survive is the step count, the same everywhere.
    tree = {
        "model": weights,
        "optimizer": [{"param_state": state["param_state"]} for state in states],
        "optimizer_step": states[0]["optimizer"]["param_groups"][0].get("step"),
    }
    if reference is not None:
        with reference.in_place():
            kept = _weights(model, "reference.")
            for tensor in kept.values():
                # The entries hold the parameters themselves, which are the policy's again in a
                # moment.
                tensor.data = tensor.data.detach()
            tree["reference"] = kept
    return tree


def _weights(model: MegatronModule, prefix: str) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries = model.sharded_state_dict(prefix=prefix, metadata={"dp_cp_group": group})
    # Filled by Transformer Engine's delayed FP8 scaling only, and named by the number of shards: an
    # empty one would tie the checkpoint to the layout that wrote it.
    return {name: entry for name, entry in entries.items() if "_extra_state" not in name}


def _parts(optimizer) -> list:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _allocate_state(optimizer) -> None:
    """Give optimizers that have not stepped yet their moments, by a step that changes nothing.

    Megatron's distributed optimizer over torch's AdamW can neither save nor load without them.
    """
    for part in _parts(optimizer):
        inner = part.optimizer
        if inner.state:
            continue
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
