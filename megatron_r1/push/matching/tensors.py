"""The HF tensors of a weight table, and the bytes that their regions take on the wire."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.adapter_table import adapter_shapes
from megatron_r1.models.weights.formats.published_layout import (
    FP8_BLOCK_SIZE,
    is_quantized,
    scale_name,
    scale_shape,
)
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.splits import Shape
from megatron_r1.models.weights.table import WeightRule, WeightTable, weight_table
from megatron_r1.push.matching.regions import Region


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: the full name in the checkpoint, with layer and expert.
        rule: the weight table's rule that has the tensor among its sources.
        source: index of the tensor in its rule's sources.
        part: "embedding", "layers", "final_norm" or "head".
        layer: the global index of its layer, or None.
        expert: the global index of its expert, or None.
    """

    name: str
    rule: WeightRule
    source: int
    part: str
    layer: int | None = None
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the whole tensor in the checkpoint."""
        return self.rule.sources[self.source].shape


def is_tied(table: WeightTable) -> bool:
    """Return whether head and embedding are one tensor."""
    embedded_names = {source.name for rule in table.embedding for source in rule.sources}
    return any(source.name in embedded_names for rule in table.head for source in rule.sources)


def checkpoint_tensors(
    table: WeightTable, parts: Container[str], layers: Iterable[int], experts: Iterable[int]
) -> Iterator[HFTensor]:
    """Yield the tensors of `parts` in checkpoint order.

    A tied head is yielded as the embedding only.

    Args:
        table: the model's rules.
        parts: those of "embedding", "layers", "final_norm" and "head" that are yielded.
        layers: which layers, where "layers" is one of the parts; MTP layers follow the decoder's.
        experts: which routed experts."""
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


def expert_tensors(
    table: WeightTable, layers: Iterable[int], experts: Sequence[int]
) -> Iterator[HFTensor]:
    """Yield the tensors of routed experts in checkpoint order.

    Args:
        table: the model's rules.
        layers: which layers; MTP layers follow the decoder's.
        experts: which routed experts."""
    rules = table.layers + table.mtp
    for layer in layers:
        expert_rules = [rule for rule in rules[layer] if rule.is_expert]
        yield from _rule_tensors(expert_rules, "layers", layer, experts)


def _rule_tensors(
    rules: Iterable[WeightRule], part: str, layer: int | None = None, experts: Iterable[int] = ()
) -> Iterator[HFTensor]:
    prefix = "" if layer is None else f"model.layers.{layer}."
    for rule in rules:
        for expert in experts if rule.is_expert else (None,):
            for index, source in enumerate(rule.sources):
                name = prefix + source.name.replace("{e}", str(expert))
                yield HFTensor(name, rule, index, part, layer, expert)


CountBytes = Callable[[str, str | None, Region], int]
"""(HF name, the tensor's own dtype or None, region) -> bytes on the wire."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def plain_bytes(dtype: str) -> CountBytes:
    """Count every tensor in `dtype`, except those that keep their own."""
    return lambda name, own_dtype, region: region.num_elements * _WIDTH[own_dtype or dtype]


def fp8_bytes(name: str, own_dtype: str | None, region: Region) -> int:
    """Count projections as float8 with an fp32 scale per 128 x 128 block, the rest in bf16.

    Args:
        name: the HF tensor's name.
        own_dtype: its own dtype; None: the model's.
        region: the rows and columns that are counted."""
    if not is_quantized(name):
        return region.num_elements * _WIDTH[own_dtype or "bfloat16"]
    height, width = region.bottom - region.top, region.right - region.left
    return region.num_elements + 4 * -(-height // FP8_BLOCK_SIZE) * -(-width // FP8_BLOCK_SIZE)


def pushed_tensors(
    hf_config: HFConfig, *, fp8: bool, drafts: bool = False, adapters: WeightTable | None = None
) -> list[tuple[str, Shape]]:
    """Return the names and shapes of the tensors in a checkpoint of the model, plain or in FP8.

    Args:
        hf_config: the model's `config.json`.
        fp8: whether to include the scales of quantized tensors.
        drafts: whether to include the tensors of the MTP layers, but not their copies of embedding
            and head, which the drafter shares with the model.
        adapters: the weight table of the adapters, whose factors alone are then pushed.
    """
    if adapters is not None:
        return list(adapter_shapes(adapters).items())
    names_and_shapes: list[tuple[str, Shape]] = []
    copies = weight_table(hf_config).duplicate_of
    for name, (shape, _) in hf_tensors(hf_config, with_mtp=drafts).items():
        if name in copies:
            continue
        names_and_shapes.append((name, shape))
        if fp8 and is_quantized(name):
            names_and_shapes.append((scale_name(name), scale_shape(shape)))
    return names_and_shapes
