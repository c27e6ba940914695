"""How a parameter is split over ranks, as pieces of Hugging Face tensors. No torch.

A split turns the Hugging Face tensors of a Megatron parameter (`Source`) and a rank into the shape
of that rank's parameter and its pieces (`Piece`): runs of rows or columns of one tensor, at some
offset of the parameter. `models.weights.table` names the split of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_r1.base.errors import Cause, UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: its name, relative to its layer.
        shape: its full shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """A piece of an HF tensor: `length` rows (dim 0) or columns (dim 1), and their offset on a
    rank.

    hf[name].narrow(dim, hf_start, length) equals parameter.narrow(dim, local_start, length).

    Attributes:
        hf_name: name of the HF tensor.
        dim: 0 for rows, 1 for columns.
        hf_start: the first row or column in the HF tensor.
        local_start: the first one in this rank's parameter.
        length: the number of rows or columns."""

    hf_name: str
    dim: int
    hf_start: int
    local_start: int
    length: int


Split = Callable[[tuple[Source, ...], int, int], tuple[Shape, list[Piece]]]
"""(sources, rank, num_ranks) -> the shape of that rank's parameter and its pieces."""


def replicated(sources: tuple[Source, ...], rank: int, num_ranks: int) -> tuple[Shape, list[Piece]]:
    """Return shape and pieces of a replicated tensor: every rank holds it whole.

    Args:
        sources: the Hugging Face tensor, one.
        rank: not used; an argument of every `Split`.
        num_ranks: not used: every rank holds the same."""
    (source,) = sources
    return source.shape, [Piece(source.name, 0, 0, 0, source.shape[0])]


def replicated_stack(
    sources: tuple[Source, ...], rank: int, num_ranks: int
) -> tuple[Shape, list[Piece]]:
    """Return shape and pieces of replicated tensors, one below the other.

    Args:
        sources: the Hugging Face tensors, concatenated in this order.
        rank: not used; an argument of every `Split`.
        num_ranks: not used: every rank holds the same."""
    return column_parallel(sources, 0, 1)


def column_parallel(
    sources: tuple[Source, ...], rank: int, num_ranks: int
) -> tuple[Shape, list[Piece]]:
    """Return shape and pieces of a column-parallel tensor: its rows (output features) are split.

    Several sources are concatenated: [gate of this rank; up of this rank].

    Args:
        sources: the Hugging Face tensors, concatenated in this order.
        rank: the rank within the group that splits the parameter.
        num_ranks: the number of ranks of that group.
    """
    return _interleave_sources(sources, num_blocks=num_ranks, blocks=range(rank, rank + 1))


def row_parallel(
    sources: tuple[Source, ...], rank: int, num_ranks: int
) -> tuple[Shape, list[Piece]]:
    """Return shape and pieces of a row-parallel tensor: its columns (input features) are split.

    Args:
        sources: the Hugging Face tensor, one.
        rank: the rank within the group that splits the parameter.
        num_ranks: the number of ranks of that group.
    """
    (source,) = sources
    height, width = source.shape
    length = _part_length(width, num_ranks, source)
    return (height, length), [Piece(source.name, 1, rank * length, 0, length)]


def vocab_parallel(
    sources: tuple[Source, ...], rank: int, num_ranks: int
) -> tuple[Shape, list[Piece]]:
    """Return shape and pieces of a vocabulary-parallel tensor: rows are split, and padded to a
    multiple of `num_ranks`.

    Args:
        sources: the Hugging Face tensor, one.
        rank: the rank within the group that splits the parameter.
        num_ranks: the number of ranks of that group.
    """
    (source,) = sources
    num_tokens, width = source.shape
    height = -(-num_tokens // num_ranks)
    # With more ranks than the last rows need, a rank may hold padding alone.
    start = min(rank * height, num_tokens)
    length = min(height, num_tokens - start)
    pieces = [Piece(source.name, 0, start, 0, length)] if length else []
    return (height, width), pieces


@dataclass(frozen=True)
class QueryGroups:
    """Grouped-query attention: [queries; key; value] of each group. Ranks hold whole groups or,
    where there are more ranks than groups, equal runs of rows, whose products Megatron gathers
    (attention.py:1839, Megatron-Core 0.19.2).

    Attributes:
        num_groups: the number of key and value heads."""

    num_groups: int

    def __call__(
        self, sources: tuple[Source, ...], rank: int, num_ranks: int
    ) -> tuple[Shape, list[Piece]]:
        """Return the shape of a rank's query, key and value rows, and their pieces.

        Raises:
            UserError: the ranks neither divide the key and value heads nor are a multiple of them.
        """
        num_groups = self.num_groups
        if num_groups % num_ranks and num_ranks % num_groups:
            raise UserError(
                f"parallel.tensor={num_ranks} neither divides num_key_value_heads={num_groups} nor "
                f"is a multiple of it; choose a divisor or a multiple of {num_groups}",
                key="parallel.tensor",
                cause=Cause.INDIVISIBLE,
            )
        if num_groups % num_ranks == 0:
            num_local = num_groups // num_ranks
            local_groups = range(rank * num_local, (rank + 1) * num_local)
            return _interleave_sources(sources, num_blocks=num_groups, blocks=local_groups)
        all_groups = range(num_groups)
        (height, *width), pieces = _interleave_sources(
            sources, num_blocks=num_groups, blocks=all_groups
        )
        if height % num_ranks:
            raise UserError(
                f"parallel.tensor={num_ranks} does not divide the {height} rows of query, key and "
                f"value together ({sources[0].name}); choose a divisor of {height}",
                key="parallel.tensor",
                cause=Cause.INDIVISIBLE,
            )
        num_rows = height // num_ranks
        return (num_rows, *width), list(pieces_of_rows(pieces, rank * num_rows, num_rows))


def pieces_of_rows(pieces: Iterable[Piece], start: int, length: int) -> Iterator[Piece]:
    """Yield the parts of `pieces` (dim 0) within rows [start, start + length) of their parameter,
    placed in a parameter that has these rows only.

    Args:
        pieces: the pieces, all of dim 0.
        start: the first row.
        length: the number of rows.
    """
    for piece in pieces:
        first = max(start, piece.local_start)
        end = min(start + length, piece.local_start + piece.length)
        if first < end:
            num_skipped = first - piece.local_start
            yield replace(
                piece,
                hf_start=piece.hf_start + num_skipped,
                local_start=first - start,
                length=end - first,
            )


def _interleave_sources(
    sources: tuple[Source, ...], *, num_blocks: int, blocks: range
) -> tuple[Shape, list[Piece]]:
    """Cut each source into `num_blocks` runs of rows; return the chosen blocks in order, in each of
    them the runs of all sources one below the other."""
    lengths = [_part_length(source.shape[0], num_blocks, source) for source in sources]
    pieces, end = [], 0
    for block in blocks:
        for source, length in zip(sources, lengths, strict=True):
            pieces.append(Piece(source.name, 0, block * length, end, length))
            end += length
    return (end, *sources[0].shape[1:]), pieces


def _part_length(size: int, num_parts: int, source: Source) -> int:
    if size % num_parts:
        key = "parallel.expert_tensor" if "{e}" in source.name else "parallel.tensor"
        raise UserError(
            f"{source.name} {source.shape} cannot be split into {num_parts} parts: set {key} to a "
            f"divisor of {size}",
            key=key,
            cause=Cause.INDIVISIBLE,
        )
    return size // num_parts
