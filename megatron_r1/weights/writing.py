"""Export: all ranks together write safetensors files, each its own pieces straight into place.

Every rank computes the same header from the weight table. Rank 0 makes the file at its full size
under a temporary name, every owner maps it and copies its pieces where they belong (nothing is
gathered; no rank ever holds a whole tensor), rank 0 renames it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from megatron_r1.errors import UserError
from megatron_r1.files import fsync
from megatron_r1.weights.layout import table
from megatron_r1.weights.local import has_mtp, local_pieces
from megatron_r1.weights.stored.file_plan import FilePlan, Placed, plan_file, stored_tensors


def write_hf(
    model_chunks: Sequence,
    hf: dict,
    path: str | Path,
    *,
    dtype: torch.dtype,
    names: Collection[str] | None = None,
    durable: bool = False,
) -> None:
    """Write the model, or its HF tensors in `names`, as one safetensors file; call on every rank.

    path: seen by all ranks; replaced atomically: a reader that still maps the previous file
    keeps the previous weights. dtype: of the stored
    tensors, except those that keep their own (the router's correction bias stays float32). durable:
    fsync before renaming. Raises UserError on every rank when the file cannot be made (no such
    folder, not enough space) and for unknown `names`.
    """
    plan = plan_file(stored_tensors(hf, dtype, with_mtp=has_mtp(model_chunks), names=names))
    write_files(model_chunks, hf, {Path(path): plan}, durable=durable)


def write_files(
    model_chunks: Sequence, hf: dict, plans: Mapping[Path, FilePlan], *, durable: bool
) -> None:
    """Write several planned files at once; call on every rank with the same plans."""
    unfinished = {path: path.with_name(path.name + ".incomplete") for path in plans}
    on_first_rank(lambda: [_create(unfinished[path], plan) for path, plan in plans.items()])
    copies = defaultdict(list)
    for copy, original in table(hf).copies.items():
        copies[original].append(copy)
    home = {name: path for path, plan in plans.items() for name in plan.tensors}
    views: dict[Path, torch.Tensor] = {}
    with torch.no_grad():
        for parameter, pieces, owner in local_pieces(model_chunks, hf):
            for piece in pieces if owner else ():
                values = parameter.narrow(piece.dim, piece.local_start, piece.length)
                for name in (piece.hf_name, *copies[piece.hf_name]):
                    if name not in home:
                        continue
                    path = home[name]
                    if path not in views:
                        views[path] = torch.from_file(
                            str(unfinished[path]),
                            shared=True,
                            size=plans[path].num_bytes,
                            dtype=torch.uint8,
                        )
                    target = _view(views[path], plans[path].tensors[name])
                    target.narrow(piece.dim, piece.hf_start, piece.length).copy_(values)
    if durable:
        for path in views:
            fsync(unfinished[path])
    views.clear()
    barrier()
    on_first_rank(lambda: [os.replace(unfinished[path], path) for path in plans])


def on_first_rank(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait; an OSError there is a ValueError everywhere."""
    outcome: list[str | None] = [None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [f"cannot write {error.filename}: {error.strerror}"]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise UserError(outcome[0])


def barrier() -> None:
    """Wait for every rank; nothing when there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _create(path: Path, plan: FilePlan) -> None:
    with open(path, "wb") as file:
        file.write(plan.header)
        try:
            # Reserved, not only sized: writing through a map into a full filesystem is a bus error.
            os.posix_fallocate(file.fileno(), 0, plan.num_bytes)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror} ({plan.num_bytes} bytes)", path
            ) from error


def _view(mapped: torch.Tensor, at: Placed) -> torch.Tensor:
    return mapped[at.offset : at.offset + at.num_bytes].view(at.dtype).view(at.shape)
