"""Export: all ranks together write safetensors files, each its own pieces at their offsets.

Every rank computes the same header from the weight table. Rank 0 creates the file at its full size
under a temporary name, every owner maps it and copies its pieces into place (nothing is gathered;
no rank ever holds a whole tensor), and rank 0 renames it."""

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.errors import Cause, UserError
from megatron_r1.files import fsync, make_folder
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.weights.decoder import table
from megatron_r1.weights.local import has_mtp, local_pieces, merged
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stacked import StackedPart, stacked_part
from megatron_r1.weights.stored import hf_folder
from megatron_r1.weights.stored.safetensors_file import FilePlan, plan_file, stored_tensors


def save_hf(
    model_chunks: Sequence,
    hf: dict,
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `out_folder`, which transformers and vLLM can load; call on every rank.

    The configuration and tokenizer files are copied from `source_folder`; all ranks must see both
    folders. The folder appears complete or not at all (an existing one is replaced). Weights are
    split into files of at most max_shard_bytes, except for larger single tensors. Raises UserError
    on every rank when something cannot be written."""
    source, with_mtp = Path(source_folder), has_mtp(model_chunks)
    files = hf_folder.split_into_files(
        stored_tensors(hf, dtype, with_mtp=with_mtp), max_shard_bytes
    )

    def begin(folder: Path) -> None:
        hf_folder.carry_files(source, folder)
        hf_folder.write_config(source, folder, dtype, with_mtp, has_score_head(hf))
        hf_folder.write_index(folder, files)

    with new_folder(Path(out_folder), begin) as folder:
        plans = {folder / name: plan_file(content) for name, content in files.items()}
        write_files(model_chunks, hf, plans, durable=True)


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

    path: seen by all ranks; replaced atomically, so that a reader which still maps the previous
    file keeps the previous weights. dtype: of the stored tensors, except those with a dtype of
    their own (the router's correction bias stays float32). durable: fsync before renaming. Raises
    UserError on every rank when the file cannot be created (no such folder, not enough space), and
    ValueError for unknown `names`."""
    plan = plan_file(stored_tensors(hf, dtype, with_mtp=has_mtp(model_chunks), names=names))
    write_files(model_chunks, hf, {Path(path): plan}, durable=durable)


def write_files(
    model_chunks: Sequence, hf: dict, plans: Mapping[Path, FilePlan], *, durable: bool
) -> None:
    """Write several planned files at once; call on every rank with the same plans. Adapters are
    merged into the weights."""
    copies = defaultdict(list)
    for copy, original in table(hf).copies.items():
        copies[original].append(copy)
    held, part_of = local_pieces(model_chunks, hf), partial(stacked_part, hf)
    write_pieces(held, plans, copies, part_of, durable=durable)


def write_pieces(
    held: Iterable[tuple[torch.Tensor, Sequence[Piece], bool]],
    plans: Mapping[Path, FilePlan],
    copies: Mapping[str, Sequence[str]],
    part_of: Callable[[str], StackedPart | None] = lambda name: None,
    *,
    durable: bool,
) -> None:
    """Write the planned files; call on every rank with that rank's (parameter, pieces, owner).

    copies: tensor -> its further names. part_of: returns the part that a tensor is of a stored
    tensor of all experts, or None if it is stored alone."""
    unfinished = {path: path.with_name(path.name + ".incomplete") for path in plans}

    def create() -> None:
        for path, plan in plans.items():
            _create(unfinished[path], plan)

    def rename() -> None:
        for path in plans:
            os.replace(unfinished[path], path)
        for folder in {path.parent for path in plans} if durable else ():
            fsync(folder)

    on_first_rank(create)
    home = {name: path for path, plan in plans.items() for name in plan.tensors}
    views: dict[Path, torch.Tensor] = {}
    with torch.no_grad():
        for parameter, pieces, owner in held:
            for piece in pieces if owner else ():
                part = part_of(piece.hf_name)
                stored = part.name if part else piece.hf_name
                names = (stored, *copies.get(piece.hf_name, ()))
                if not home.keys() & set(names):
                    continue
                values = _values(parameter, piece)
                for name in names:
                    if name not in home:
                        continue
                    path = home[name]
                    if path not in views:
                        file, size = str(unfinished[path]), plans[path].num_bytes
                        views[path] = torch.from_file(
                            file, shared=True, size=size, dtype=torch.uint8
                        )
                    at = plans[path].tensors[name]
                    target = views[path][at.offset : at.offset + at.num_bytes].view(at.dtype)
                    target = target.view(at.shape)
                    if part:
                        target = part.of(target[part.expert])
                    target.narrow(piece.dim, piece.hf_start, piece.length).copy_(values)
    if durable:
        for path in views:
            fsync(unfinished[path])
    views.clear()
    if dist.is_initialized():
        dist.barrier()  # over all ranks: the files are complete when every owner has written
    on_first_rank(rename)


def _values(parameter: torch.Tensor, piece: Piece) -> torch.Tensor:
    here = slice(piece.local_start, piece.local_start + piece.length)
    if parameter.dim() == 1:
        return parameter[here]
    everything = slice(None)
    return merged(parameter, *((here, everything) if piece.dim == 0 else (everything, here)))


def on_first_rank(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on rank 0 while the others wait; raise its OSError as a UserError on all ranks.

    group: all ranks, over another backend than the default group's."""
    outcome: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            named = f"cannot write {error.filename}: {error.strerror}"
            outcome = [named if error.filename else str(error)]
    if dist.is_initialized():
        # Over all ranks: each has to raise what went wrong on the first.
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0]:
        raise UserError(outcome[0], key="output", cause=Cause.UNREADABLE)


@contextlib.contextmanager
def new_folder(out: Path, begin: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a folder that all ranks write into; the end of the block renames it to `out` and
    replaces a folder that has this name. begin: writes into the folder first, on rank 0."""
    unfinished = out.with_name(out.name + ".incomplete")

    def create() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        make_folder(out.parent)
        unfinished.mkdir()
        begin(unfinished)

    on_first_rank(create)
    yield unfinished
    on_first_rank(lambda: _replace_folder(unfinished, out))


def _replace_folder(unfinished: Path, out: Path) -> None:
    # A folder cannot be renamed over another: for an instant neither name exists, but both folders
    # are on disk.
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        os.rename(out, previous)
    os.rename(unfinished, out)
    fsync(out.parent)
    shutil.rmtree(previous, ignore_errors=True)


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
