"""The HF tensors of a weight table, one by one, with what a push has to know of each."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from megatron_r1.weights.rules import Rule, Shape, Table


@dataclass(frozen=True)
class Tensor:
    """part: "embedding", "layers", "final_norm" or "head". layer, expert: global indices, or None.
    source: which of the rule's HF tensors it is."""

    name: str
    rule: Rule
    source: int
    part: str
    layer: int | None = None
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        return self.rule.sources[self.source].shape


def embedded_names(table: Table) -> set[str]:
    """The names of the embedding's tensors; a tied head's is among them."""
    return {source.name for rule in table.embedding for source in rule.sources}


def is_tied(table: Table) -> bool:
    """Whether head and embedding are one tensor."""
    embedded = embedded_names(table)
    return any(source.name in embedded for rule in table.head for source in rule.sources)


def tensors(
    table: Table, parts: Container[str], layers: Iterable[int], experts: Iterable[int]
) -> Iterator[Tensor]:
    """In checkpoint order, of `parts` and, where "layers" is one, of `layers`; of routed experts
    those in `experts`. A tied head comes as the embedding only."""
    if "embedding" in parts:
        yield from _of_rules(table.embedding, "embedding")
    if "layers" in parts:
        for layer in layers:
            yield from _of_rules(table.layers[layer], "layers", layer, experts)
    if "final_norm" in parts:
        yield from _of_rules(table.final_norm, "final_norm")
    if "head" in parts and not is_tied(table):
        yield from _of_rules(table.head, "head")


def _of_rules(rules, part: str, layer: int | None = None, experts=()) -> Iterator[Tensor]:
    prefix = "" if layer is None else f"model.layers.{layer}."
    for rule in rules:
        for expert in experts if rule.expert else (None,):
            for index, source in enumerate(rule.sources):
                name = prefix + source.name.replace("{e}", str(expert))
                yield Tensor(name, rule, index, part, layer, expert)
