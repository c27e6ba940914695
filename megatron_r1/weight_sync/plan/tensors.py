"""The HF tensors of a weight table, and rectangles of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from megatron_r1.weights.rules import Piece, Rule, Shape, Table


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint.

    part: "embedding", "layers", "final_norm" or "head". layer, expert: global indices, or None.
    source: index of the tensor in its rule's sources."""

    name: str
    rule: Rule
    source: int
    part: str
    layer: int | None = None
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        return self.rule.sources[self.source].shape


@dataclass(frozen=True, order=True)
class Region:
    """Rows [top, bottom) and columns [left, right) of one HF tensor; a vector is one column."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        return cls(0, shape[0], 0, shape[1] if len(shape) > 1 else 1)

    @classmethod
    def along(cls, shape: Shape, dim: int, start: int, length: int) -> Region:
        """Return `length` rows (dim 0) or columns (dim 1) from `start` of a tensor of `shape`."""
        whole = cls.whole(shape)
        if dim == 0:
            return cls(start, start + length, whole.left, whole.right)
        return cls(whole.top, whole.bottom, start, start + length)

    @classmethod
    def from_piece(cls, piece: Piece, shape: Shape) -> Region:
        """Return the region that `piece` covers of its HF tensor, which has `shape`."""
        return cls.along(shape, piece.dim, piece.hf_start, piece.length)

    def intersection(self, other: Region) -> Region | None:
        """Return the region that both cover, or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def num_elements(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def is_tied(table: Table) -> bool:
    """Return whether head and embedding are one tensor."""
    embedded = {source.name for rule in table.embedding for source in rule.sources}
    return any(source.name in embedded for rule in table.head for source in rule.sources)


def checkpoint_tensors(
    table: Table, parts: Container[str], layers: Iterable[int], experts: Iterable[int]
) -> Iterator[HFTensor]:
    """Yield the tensors of `parts` in checkpoint order.

    layers: which layers, where "layers" is one of the parts; MTP layers follow the decoder's.
    experts: which routed experts.
    A tied head is yielded as the embedding only."""
    if "embedding" in parts:
        yield from _rule_tensors(table.embedding, "embedding")
    if "layers" in parts:
        rules = table.layers + table.mtp
        for layer in layers:
            yield from _rule_tensors(rules[layer], "layers", layer, experts)
    if "final_norm" in parts:
        yield from _rule_tensors(table.final_norm, "final_norm")
    if "head" in parts and not is_tied(table):
        yield from _rule_tensors(table.head, "head")


def _rule_tensors(
    rules: Iterable[Rule], part: str, layer: int | None = None, experts: Iterable[int] = ()
) -> Iterator[HFTensor]:
    prefix = "" if layer is None else f"model.layers.{layer}."
    for rule in rules:
        for expert in experts if rule.expert else (None,):
            for index, source in enumerate(rule.sources):
                name = prefix + source.name.replace("{e}", str(expert))
                yield HFTensor(name, rule, index, part, layer, expert)
