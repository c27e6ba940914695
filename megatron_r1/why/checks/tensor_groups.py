"""Groups the tensors of a model that may be stale together in an engine, or exchanged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_LAYERS_FOR_ALL_PAIRS = 8
"""The most layers of a model whose every pair is tried as exchanged; in larger ones, neighbors."""
LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.*)")
FUSED_MODULES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that engines keep as one."""
EXCHANGEABLE_MODULES = (("gate_proj", "up_proj"), ("k_proj", "v_proj"))
"""Modules of a layer whose tensors may be taken for each other's."""


def whole_groups(
    names: Iterable[str],
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Return groups of tensors that may be stale together, by noun: those outside of layers, each
    and all, and parts of all layers; and the layers.

    Args:
        names: the tensors."""
    outside: list[str] = []
    layers: dict[str, list[str]] = {}
    names_by_noun: dict[str, list[str]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            layers.setdefault(f"layer {match[2]}", []).append(name)
        else:
            outside.append(name)
    for layer_names in layers.values():
        for noun, part_names in module_groups(layer_names).items():
            names_by_noun.setdefault(f"{noun} of all layers", []).extend(part_names)
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in outside}
    if len(outside) > 1:
        groups[" and ".join(outside)] = tuple(outside)
    if len(layers) > 1:
        groups |= {noun: tuple(part_names) for noun, part_names in names_by_noun.items()}
    return groups, {noun: tuple(layer_names) for noun, layer_names in layers.items()}


def layer_parts(layer: str, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the groups of a layer's tensors that may be stale together, by noun.

    Args:
        layer: its noun.
        names: its tensors."""
    return {
        part[0] if len(part) == 1 else f"{noun} of {layer}": part
        for noun, part in module_groups(names).items()
        if len(part) < len(names)
    }


def module_groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return a layer's tensors by module, and by modules that engines keep as one: names in the
    layer, without those that have the same tensors.

    Args:
        names: the tensors."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.partition(".layers.")[2].split(".")[1:]
        for count in range(1, len(words) + 1):
            groups.setdefault(".".join(words[:count]), []).append(name)
    for modules in FUSED_MODULES:
        for parent in {noun.rpartition(".")[0] for noun in groups if noun.endswith(modules)}:
            nouns = [f"{parent}.{module}" for module in modules]
            if all(noun in groups for noun in nouns):
                groups[f"{parent}.{', '.join(modules)}"] = [
                    name for noun in nouns for name in groups[noun]
                ]
    noun_by_group = {tuple(group): noun for noun, group in groups.items()}
    return {noun: group for group, noun in noun_by_group.items()}


def tensor_exchanges(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield exchanges that keep all shapes: what is exchanged, and the tensors that have others'
    values. Modules of all layers come first, then of each layer, then layers.

    Args:
        tensors: a model's, by name."""
    by_layer: dict[int, dict[str, str]] = {}
    for name in tensors:
        if match := LAYER.fullmatch(name):
            by_layer.setdefault(int(match[2]), {})[match[3]] = name
    for pair in EXCHANGEABLE_MODULES:
        by_number = {
            layer: sources
            for layer, names in by_layer.items()
            if (sources := _exchanged_modules(tensors, names, pair))
        }
        if len(by_number) > 1:
            all_sources = {
                name: value
                for layer_sources in by_number.values()
                for name, value in layer_sources.items()
            }
            yield f"{pair[0]} and {pair[1]} of all layers", all_sources
        for layer, sources in by_number.items():
            yield f"{pair[0]} and {pair[1]} of layer {layer}", sources
    layers = sorted(by_layer)
    for a, b in (
        combinations(layers, 2) if len(layers) <= MAX_LAYERS_FOR_ALL_PAIRS else pairwise(layers)
    ):
        names, other_names = by_layer[a], by_layer[b]
        if names.keys() == other_names.keys() and all(
            tensors[names[part]].shape == tensors[other_names[part]].shape for part in names
        ):
            yield (
                f"layers {a} and {b}",
                {names[part]: tensors[other_names[part]] for part in names}
                | {other_names[part]: tensors[names[part]] for part in names},
            )


def _exchanged_modules(
    tensors: dict[str, Tensor], names: dict[str, str], pair: tuple[str, str]
) -> dict[str, Tensor]:
    """Return the values of a layer's tensors with two modules exchanged; empty where they are not
    there or have other shapes."""
    sources: dict[str, Tensor] = {}
    for part, name in names.items():
        for module, other_module in (pair, pair[::-1]):
            other_name = names.get(part.replace(f"{module}.", f"{other_module}."))
            if f"{module}." not in part or other_name is None:
                continue
            if tensors[name].shape == tensors[other_name].shape:
                sources[name] = tensors[other_name]
    return sources
