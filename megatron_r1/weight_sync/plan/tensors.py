"""The HF tensors of a weight table, one by one, with the facts that a push needs of each."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from megatron_r1.weights.rules import Rule, Shape, Table


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint.

    part: "embedding", "layers", "final_norm" or "head". layer, expert: global indices, or None.
    source: index of the tensor in its rule's sources.
    """

    name: str
    rule: Rule
    source: int
    part: str
    layer: int | None = None
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        return self.rule.sources[self.source].shape


def is_tied(table: Table) -> bool:
    """Return whether head and embedding are one tensor."""
    embedded = {source.name for rule in table.embedding for source in rule.sources}
    return any(source.name in embedded for rule in table.head for source in rule.sources)


def checkpoint_tensors(
    table: Table, parts: Container[str], layers: Iterable[int], experts: Iterable[int]
) -> Iterator[HFTensor]:
    """Yield the tensors of `parts` in checkpoint order.

    layers: which decoder layers, where "layers" is one of the parts. experts: which routed experts.
    A tied head is yielded as the embedding only.
    """
    if "embedding" in parts:
        yield from _tensors_of(table.embedding, "embedding")
    if "layers" in parts:
        for layer in layers:
            yield from _tensors_of(table.layers[layer], "layers", layer, experts)
    if "final_norm" in parts:
        yield from _tensors_of(table.final_norm, "final_norm")
    if "head" in parts and not is_tied(table):
        yield from _tensors_of(table.head, "head")


def _tensors_of(
    rules: Iterable[Rule], part: str, layer: int | None = None, experts: Iterable[int] = ()
) -> Iterator[HFTensor]:
    prefix = "" if layer is None else f"model.layers.{layer}."
    for rule in rules:
        for expert in experts if rule.expert else (None,):
            for index, source in enumerate(rule.sources):
                name = prefix + source.name.replace("{e}", str(expert))
                yield HFTensor(name, rule, index, part, layer, expert)
