"""Export: all ranks together write safetensors files, each its own pieces at their offsets.

Every rank computes the same header from the weight table. Rank 0 creates the file at its full size
under a temporary name, every owner writes the bytes of its pieces and no others (nothing is
gathered; no rank ever holds a whole tensor), and rank 0 renames it."""

import contextlib
import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import fsync, make_folder
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.weights.formats import hf_writer
from megatron_r1.models.weights.formats.stacked_experts import StackedPart, stacked_part
from megatron_r1.models.weights.formats.tensor_files import (
    FilePlan,
    PlannedTensor,
    plan_file,
    stored_tensors,
    write_region,
)
from megatron_r1.models.weights.loading import has_mtp, local_pieces, merge_adapter
from megatron_r1.models.weights.splits import Piece
from megatron_r1.models.weights.table import weight_table

BLOCK_BYTES = 256 << 20
"""The most bytes of a parameter that are copied to the host at once."""


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder, which transformers and vLLM can load; call on every rank.

    The folder appears complete or not at all (an existing one is replaced).

    Args:
        model_chunks: this rank's virtual pipeline stages, bare or wrapped.
        hf_config: the model's `config.json`.
        source_folder: the folder from which configuration and tokenizer files are copied; all ranks
            see it.
        out_folder: the new folder; all ranks see it.
        dtype: the dtype of the written weights.
        max_shard_bytes: the largest weight file in bytes, unless a single tensor is larger.

    Raises:
        UserError: something cannot be written; on every rank."""
    source, with_mtp = Path(source_folder), has_mtp(model_chunks)
    files = hf_writer.split_into_files(
        stored_tensors(hf_config, dtype, with_mtp=with_mtp), max_shard_bytes
    )

    def begin(folder: Path) -> None:
        hf_writer.copy_model_files(source, folder)
        hf_writer.write_config(source, folder, dtype, with_mtp, has_score_head(hf_config))
        hf_writer.write_index(folder, files)

    with write_folder(Path(out_folder), begin) as folder:
        plans = {folder / name: plan_file(content) for name, content in files.items()}
        _write_files(model_chunks, hf_config, plans, durable=True)


def write_hf(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    path: str | Path,
    *,
    dtype: torch.dtype,
    names: Collection[str] | None = None,
    durable: bool = False,
) -> None:
    """Write the model, or its HF tensors in `names`, as one safetensors file; call on every rank.

    Args:
        model_chunks: this rank's part of the model.
        hf_config: the model's config.json.
        path: seen by all ranks; replaced atomically, so that a reader which still maps the previous
            file keeps the previous weights.
        dtype: the dtype of the stored tensors, except those with a dtype of their own (the router's
            correction bias stays float32).
        names: the tensors to write; None: all.
        durable: fsync before renaming.

    Raises:
        UserError: the file cannot be created (no such folder, not enough space); on every rank.
        ValueError: unknown `names`."""
    plan = plan_file(stored_tensors(hf_config, dtype, with_mtp=has_mtp(model_chunks), names=names))
    _write_files(model_chunks, hf_config, {Path(path): plan}, durable=durable)


def _write_files(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    plans: Mapping[Path, FilePlan],
    *,
    durable: bool,
) -> None:
    """Write several planned files at once; call on every rank with the same plans. Adapters are
    merged into the weights.

    Args:
        model_chunks: this rank's virtual stages.
        hf_config: the model's `config.json`.
        plans: the files by path.
        durable: fsync before renaming."""
    copies = defaultdict(list)
    for copy, original in weight_table(hf_config).duplicate_of.items():
        copies[original].append(copy)
    local_parameters = local_pieces(model_chunks, hf_config)
    part_of = partial(stacked_part, hf_config)
    write_pieces(local_parameters, plans, copies, part_of, durable=durable)


def write_pieces(
    local_parameters: Iterable[tuple[torch.Tensor, Sequence[Piece], bool]],
    plans: Mapping[Path, FilePlan],
    copies: Mapping[str, Sequence[str]],
    part_of: Callable[[str], StackedPart | None] = lambda name: None,
    *,
    durable: bool,
) -> None:
    """Write the planned files; call on every rank with that rank's (parameter, pieces, owner).

    Args:
        local_parameters: this rank's (parameter, pieces, owner).
        plans: the files by path.
        copies: tensor -> its further names.
        part_of: returns the part that a tensor is of a stored tensor of all experts, or None if it
            is stored alone.
        durable: fsync before renaming."""
    unfinished_paths = {path: path.with_name(path.name + ".incomplete") for path in plans}

    def create() -> None:
        for path, plan in plans.items():
            _create_file(unfinished_paths[path], plan)
        _require_room(plans)

    def write() -> None:
        with contextlib.closing(_OpenFiles(plans, unfinished_paths)) as files, torch.no_grad():
            for parameter, pieces, owner in local_parameters:
                _write_parameter(files, parameter, pieces if owner else (), copies, part_of)
            if durable:
                for path in files.opened:
                    fsync(unfinished_paths[path])

    def rename() -> None:
        for path in plans:
            os.replace(unfinished_paths[path], path)
        for folder in {path.parent for path in plans} if durable else ():
            fsync(folder)

    run_on_rank_zero(create)
    _on_every_rank(write)
    run_on_rank_zero(rename)


class _OpenFiles:
    """The planned files that this rank writes into, opened at first use and closed at the end."""

    def __init__(self, plans: Mapping[Path, FilePlan], unfinished: Mapping[Path, Path]) -> None:
        self.home = {name: path for path, plan in plans.items() for name in plan.tensors}
        self.opened: dict[Path, int] = {}
        self._plans, self._unfinished = plans, unfinished

    def close(self) -> None:
        for file in self.opened.values():
            os.close(file)

    def planned(self, name: str) -> PlannedTensor:
        return self._plans[self.home[name]].tensors[name]

    def write(self, name: str, starts: Sequence[int], box: torch.Tensor) -> None:
        """Write a region of a tensor.

        Args:
            name: the tensor's name.
            starts: first index along each dimension.
            box: the values, on the host, in the dtype of the file.

        Raises:
            OSError: the write fails; it names the file.
        """
        path, tensor = self.home[name], self.planned(name)
        try:
            if path not in self.opened:
                # Only to write: a page that NFS has read is written back whole.
                self.opened[path] = os.open(self._unfinished[path], os.O_WRONLY)
            write_region(self.opened[path], tensor.offset, tensor.shape, starts, box)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._unfinished[path])) from error


def _write_parameter(
    files: _OpenFiles,
    parameter: torch.Tensor,
    pieces: Sequence[Piece],
    copies: Mapping[str, Sequence[str]],
    part_of: Callable[[str], StackedPart | None],
) -> None:
    """Write a parameter's pieces, each under all its names."""
    regions = _StackedRegions(files)
    for piece in pieces:
        part = part_of(piece.hf_name)
        if part is not None:
            if part.name in files.home:
                regions.add(part, piece, _piece_values(parameter, piece))
            continue
        names = [n for n in (piece.hf_name, *copies.get(piece.hf_name, ())) if n in files.home]
        if not names:
            continue
        values = _piece_values(parameter, piece)
        rows = max(1, BLOCK_BYTES // max(1, values[:1].nbytes))
        for first, block in zip(range(0, len(values), rows), values.split(rows), strict=True):
            for name in names:
                starts = [0] * block.dim()
                starts[piece.dim] = piece.hf_start
                starts[0] += first
                tensor = files.planned(name)
                files.write(name, starts, block.to(device="cpu", dtype=tensor.dtype))
    regions.check_whole()


class _StackedRegions:
    """Regions of tensors of all experts. Gate and up are in alternate columns of one region,
    and pieces of one parameter: it is written when it has both."""

    def __init__(self, files: _OpenFiles) -> None:
        self._files = files
        self._stacked_regions: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, set[int]]] = {}

    def add(self, part: StackedPart, piece: Piece, values: torch.Tensor) -> None:
        """Add an expert's part to its region; write the region when it is whole."""
        tensor = self._files.planned(part.name)
        offsets, sizes = part.stored_region(
            tensor.shape[1:], piece.dim, piece.hf_start, piece.length
        )
        key = part.name, (part.expert, *offsets)
        if key not in self._stacked_regions:
            self._stacked_regions[key] = torch.empty(sizes, dtype=tensor.dtype), set()
        region, filled_parts = self._stacked_regions[key]
        part.select(region).copy_(values)
        filled_parts.add(part.first)
        if len(filled_parts) == part.step:
            self._files.write(part.name, key[1], region[None])
            del self._stacked_regions[key]

    def check_whole(self) -> None:
        """Raise ValueError for a region that lacks columns."""
        if self._stacked_regions:
            names = ", ".join(name for name, _ in self._stacked_regions)
            raise ValueError(f"{names}: a parameter has gate or up of an expert without the other")


def _piece_values(parameter: torch.Tensor, piece: Piece) -> torch.Tensor:
    span = slice(piece.local_start, piece.local_start + piece.length)
    if parameter.dim() == 1:
        return parameter[span]
    whole_span = slice(None)
    return merge_adapter(parameter, *((span, whole_span) if piece.dim == 0 else (whole_span, span)))


def run_on_rank_zero(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on rank 0 while the others wait.

    Args:
        action: may raise OSError.
        group: all ranks, over another backend than the default group's.

    Raises:
        UserError: the OSError of rank 0, on all ranks.
    """
    outcome: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            message = f"cannot write {error.filename}: {error.strerror}"
            outcome = [message if error.filename else str(error)]
    if dist.is_initialized():
        # Over all ranks: each has to raise what went wrong on the first.
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0]:
        raise UserError(outcome[0], key="output", cause=Cause.UNREADABLE)


def _on_every_rank(action: Callable[[], object]) -> None:
    """Run `action` on every rank and wait for all.

    Raises:
        UserError: an OSError of any rank, on all ranks.
    """
    failure = None
    try:
        action()
    except OSError as error:
        failure = f"cannot write {error.filename}: {error.strerror}"
    failures: list[str | None] = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        # Over all ranks: what all of them write is complete when the last has written.
        dist.all_gather_object(failures, failure)
    for rank, rank_failure in enumerate(failures):
        if rank_failure:
            raise UserError(f"rank {rank}: {rank_failure}", key="output", cause=Cause.UNREADABLE)


@contextlib.contextmanager
def write_folder(out: Path, begin: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a folder that all ranks write into; the end of the block renames it to `out` and
    replaces a folder that has this name.

    Args:
        out: the final folder.
        begin: writes into the folder first, on rank 0."""
    unfinished_folder = out.with_name(out.name + ".incomplete")

    def create() -> None:
        shutil.rmtree(unfinished_folder, ignore_errors=True)
        make_folder(out.parent)
        unfinished_folder.mkdir()
        begin(unfinished_folder)

    run_on_rank_zero(create)
    yield unfinished_folder
    run_on_rank_zero(lambda: _replace_folder(unfinished_folder, out))


def _replace_folder(unfinished: Path, out: Path) -> None:
    # A folder cannot be renamed over another: for an instant neither name exists, but both folders
    # are on disk.
    previous_folder = out.with_name(out.name + ".previous")
    shutil.rmtree(previous_folder, ignore_errors=True)
    if out.exists():
        os.rename(out, previous_folder)
    os.rename(unfinished, out)
    fsync(out.parent)
    shutil.rmtree(previous_folder, ignore_errors=True)


def _require_room(plans: Mapping[Path, FilePlan]) -> None:
    """Raise OSError where a file system has less room than the files take: hours may be written
    before it is full."""
    for folder in {path.parent for path in plans}:
        num_bytes = sum(plan.num_bytes for path, plan in plans.items() if path.parent == folder)
        system = os.statvfs(folder)
        if system.f_bavail * system.f_frsize < num_bytes:
            text = f"{os.strerror(errno.ENOSPC)} ({num_bytes} bytes)"
            raise OSError(errno.ENOSPC, text, str(folder))


def _create_file(path: Path, plan: FilePlan) -> None:
    """Create a file of its full size, of which only the header has bytes. Reserving the others is
    the work of one rank, which writes all of them where the file system cannot reserve."""
    with open(path, "wb") as file:
        file.write(plan.header)
        file.truncate(plan.num_bytes)
