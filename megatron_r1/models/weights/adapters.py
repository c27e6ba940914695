"""Low-rank adapters (LoRA) of this rank's model chunks, and the fingerprint of the model that they
belong to (`attach_adapters`); export of the adapters alone, in PEFT's format (`save_adapter`).
`adapter_module` is the adapter of one layer.

Every Hugging Face layer has factors of its own, as in PEFT, also where Megatron computes several
layers as one (query, key and value; gate and up). `adapter_table` has their rules. docs/lora.md
has settings and limits."""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.base.files import atomic_write
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.build import process_groups
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.adapter_module import Adapter, add_product, add_products
from megatron_r1.models.weights.adapter_table import (
    PEFT_PREFIX,
    adapter_config,
    adapter_shapes,
    adapter_table,
)
from megatron_r1.models.weights.export import write_folder, write_pieces
from megatron_r1.models.weights.formats.tensor_files import plan_file
from megatron_r1.models.weights.layout import LayoutEntry, layout_from_table
from megatron_r1.models.weights.loading import chunk_shard, local_pieces
from megatron_r1.models.weights.splits import Piece, Shape

_BITS_DTYPES = {2: torch.int16, 4: torch.int32}


def attach_adapters(
    chunks: Sequence[GPTModel], hf_config: HFConfig, lora: LoraConfig, seed: int
) -> None:
    """Freeze the loaded model and give its target layers adapters; call before DDP.

    A is drawn as in PEFT, uniformly with the variance 1 / (3 in) of Kaiming's rule for a = sqrt(5),
    each Hugging Face tensor from a generator of its own; B is 0, so that nothing has changed yet.

    Args:
        chunks: this rank's virtual stages.
        hf_config: the model's `config.json`.
        lora: rank, scale and targets.
        seed: the seed of the draws of A.

    Raises:
        UserError: for an unknown target.
    """
    table, fingerprint = adapter_table(hf_config, lora), _model_fingerprint(chunks, hf_config)
    shapes = adapter_shapes(table)
    for chunk in chunks:
        chunk.base_fingerprint, chunk.adapter_shapes = fingerprint, shapes
        chunk.requires_grad_(False)
        entries = layout_from_table(table, chunk_shard(chunk))
        by_layer: dict[str, list[Adapter]] = defaultdict(list)
        for name in entries:
            path, _, factor = name.rpartition(".lora.")
            number, is_first, _ = factor.rpartition("a")  # of an expert in its layer, or none
            if is_first:
                a_entry, b_entry = entries[name], entries[f"{name[:-1]}b"]
                weight = getattr(chunk.get_submodule(path), f"weight{number.rstrip('.')}")
                adapter = _create_adapter(chunk, weight, a_entry, b_entry, lora)
                _initialize_factor_a(adapter, shapes, seed)
                by_layer[path].append(adapter)
        for path, adapters in by_layer.items():
            _attach_to_layer(chunk.get_submodule(path), adapters)
        if chunk.pre_process:
            # A recomputed layer gets no gradients at all where its input needs none.
            chunk.embedding.register_forward_hook(_needs_gradient)


def has_adapters(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether adapters alone are trained."""
    return hasattr(unwrap_model(chunks[0]), "base_fingerprint")


def adapter_factors(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Parameter, LayoutEntry]]:
    """Yield (Megatron name, factor, layout entry) of all adapters on this rank."""
    for chunk in chunks:
        for path, module in unwrap_model(chunk).named_modules():
            if isinstance(module, Adapter):
                a_entry, b_entry = module.entries
                yield f"{path}.a", module.a, a_entry
                yield f"{path}.b", module.b, b_entry


def adapter_pieces(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[Tensor, tuple[Piece, ...], bool]]:
    """Yield (factor, pieces, owner) of all adapters on this rank, as `local_pieces`."""
    groups = process_groups(chunks)
    for _, factor, entry in adapter_factors(chunks):
        replicas = groups.expt_dp if entry.is_expert else groups.dp_cp
        yield factor, entry.pieces, entry.is_owner and replicas.rank() == 0


def _create_adapter(
    chunk: GPTModel, weight: Tensor, a_entry: LayoutEntry, b_entry: LayoutEntry, lora: LoraConfig
) -> Adapter:
    groups = process_groups([chunk])
    group = groups.expt_tp if a_entry.is_expert else groups.tp
    by_sequence = chunk.config.sequence_parallel and not a_entry.is_expert
    adapter = Adapter((a_entry, b_entry), weight, lora.scale, group, by_sequence)
    weight.adapter = adapter  # type: ignore[attr-defined]  # what pushes and exports merge
    return adapter


def _attach_to_layer(layer: torch.nn.Module, adapters: list[Adapter]) -> None:
    if hasattr(layer, "weight"):
        layer.add_module("lora", adapters[0])
        layer.register_forward_hook(add_product)
    else:
        layer.add_module("lora", torch.nn.ModuleList(adapters))
        layer.register_forward_hook(add_products)


@torch.no_grad()
def _initialize_factor_a(adapter: Adapter, shapes: dict[str, Shape], seed: int) -> None:
    for piece in adapter.entries[0].pieces:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{piece.hf_name}".encode()))
        shape = shapes[piece.hf_name]
        bound = shape[1] ** -0.5
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        target = adapter.a.narrow(piece.dim, piece.local_start, piece.length)
        target.copy_(values.narrow(piece.dim, piece.hf_start, piece.length))


def _needs_gradient(module: torch.nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.requires_grad_() if torch.is_grad_enabled() and not out.requires_grad else out


def _model_fingerprint(chunks: Sequence[torch.nn.Module], hf_config: HFConfig) -> int:
    """Return a number that depends on every bit of the whole model's weights, not on the layout.

    It is the sum of all elements' bits, each tensor's times a number made of its name, modulo 2^64.
    """
    fingerprint = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        for parameter, pieces, owner in local_pieces(chunks, hf_config):
            for piece in pieces if owner else ():
                values = parameter.narrow(piece.dim, piece.local_start, piece.length)
                bits = values.view(_BITS_DTYPES[values.itemsize]).sum(dtype=torch.int64)
                fingerprint += bits.cpu() * zlib.crc32(piece.hf_name.encode())
    device = next(chunks[0].parameters()).device
    fingerprint = fingerprint.to(device)
    dist.all_reduce(fingerprint)  # over all ranks, which hold parts of the model
    return int(fingerprint) % 2**64


def save_adapter(
    chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    lora: LoraConfig,
    base: str,
    out: Path,
    dtype: torch.dtype,
) -> None:
    """Write `out`, which peft.PeftModel.from_pretrained loads; call on every rank.

    The folder appears complete or not at all (an existing one is replaced).

    Args:
        chunks: this rank's virtual stages.
        hf_config: the model's `config.json`.
        lora: rank, scale and targets.
        base: the folder of the model that the adapters belong to.
        out: the new folder.
        dtype: the dtype of the written factors.

    Raises:
        UserError: on every rank when something cannot be written.
    """
    table = adapter_table(hf_config, lora)
    settings = adapter_config(table, lora, base)

    def begin(folder: Path) -> None:
        text = json.dumps(settings, indent=2) + "\n"
        atomic_write(folder / "adapter_config.json", text)

    plan = plan_file({PEFT_PREFIX + name: (s, dtype) for name, s in adapter_shapes(table).items()})
    named_pieces = (
        (factor, [replace(piece, hf_name=PEFT_PREFIX + piece.hf_name) for piece in pieces], owner)
        for factor, pieces, owner in adapter_pieces(chunks)
    )
    with write_folder(out, begin) as folder:
        write_pieces(named_pieces, {folder / "adapter_model.safetensors": plan}, {}, durable=True)
