"""Adapters for this rank's model chunks, and the fingerprint of the model that they belong to."""

import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.config.lora import LoraConfig
from megatron_r1.errors import UserError
from megatron_r1.models.build import process_groups
from megatron_r1.weights.adapters.adapter import Adapter
from megatron_r1.weights.adapters.table import (
    MEGATRON_A,
    MEGATRON_B,
    adapter_shapes,
    adapter_table,
)
from megatron_r1.weights.layout import LayoutEntry, layout_of
from megatron_r1.weights.local import local_pieces, shard_of
from megatron_r1.weights.rules import Piece, Shape

_BITS = {2: torch.int16, 4: torch.int32}


def attach_adapters(chunks: Sequence, hf: dict, lora: LoraConfig, seed: int) -> None:
    """Freeze the loaded model and give its target layers adapters; call before DDP.

    A is drawn as in PEFT, uniformly with the variance 1 / (3 in) of Kaiming's rule for a = sqrt(5),
    each Hugging Face tensor from a generator of its own; B is 0, so that nothing has changed yet.
    Raises UserError for an unknown target, and for Transformer Engine's layers, whose inputs are
    normalised inside."""
    if unwrap_model(chunks[0]).config.transformer_impl != "local":
        raise UserError(
            "model.lora: not possible with Transformer Engine's layers, which GPUs use; leave "
            "model.lora out, or train on CPUs"
        )
    rules, fingerprint = adapter_table(hf, lora), _fingerprint(chunks, hf)
    shapes = adapter_shapes(rules)
    for chunk in chunks:
        chunk.base_fingerprint, chunk.adapter_shapes = fingerprint, shapes
        chunk.requires_grad_(False)
        entries = layout_of(rules, shard_of(chunk))
        for name in entries:
            if name.endswith(MEGATRON_A):
                path = name.removesuffix(MEGATRON_A)
                adapter = _attach(chunk, path, entries[name], entries[path + MEGATRON_B], lora)
                _initialize(adapter, shapes, seed)
        if chunk.pre_process:
            # A recomputed layer gets no gradients at all where its input needs none.
            chunk.embedding.register_forward_hook(_needs_gradient)


def has_adapters(chunks: Sequence) -> bool:
    """Return whether adapters alone are trained."""
    return hasattr(unwrap_model(chunks[0]), "base_fingerprint")


def adapter_factors(chunks: Sequence) -> Iterator[tuple[str, torch.nn.Parameter, LayoutEntry]]:
    """Yield (Megatron name, factor, layout entry) of all adapters on this rank."""
    for chunk in chunks:
        for path, module in unwrap_model(chunk).named_modules():
            if isinstance(module, Adapter):
                of_a, of_b = module.entries
                yield f"{path}.a", module.a, of_a
                yield f"{path}.b", module.b, of_b


def adapter_pieces(chunks: Sequence) -> Iterator[tuple[Tensor, tuple[Piece, ...], bool]]:
    """Yield (factor, pieces, owner) of all adapters on this rank, as `local_pieces`."""
    groups = process_groups(chunks)
    for _, factor, entry in adapter_factors(chunks):
        replicas = groups.expt_dp if entry.expert else groups.dp_cp
        yield factor, entry.pieces, entry.owner and replicas.rank() == 0


def _attach(chunk, path: str, of_a: LayoutEntry, of_b: LayoutEntry, lora: LoraConfig) -> Adapter:
    groups, layer = process_groups([chunk]), chunk.get_submodule(path)
    group = groups.expt_tp if of_a.expert else groups.tp
    by_sequence = chunk.config.sequence_parallel and not of_a.expert
    adapter = Adapter((of_a, of_b), layer.weight, lora.scale, group, by_sequence)
    layer.add_module("lora", adapter)
    layer.register_forward_hook(lambda module, inputs, out: (out[0] + adapter(inputs[0]), *out[1:]))
    layer.weight.adapter = adapter  # what pushes and exports merge
    return adapter


@torch.no_grad()
def _initialize(adapter: Adapter, shapes: dict[str, Shape], seed: int) -> None:
    for piece in adapter.entries[0].pieces:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{piece.hf_name}".encode()))
        shape = shapes[piece.hf_name]
        bound = shape[1] ** -0.5
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        target = adapter.a.narrow(piece.dim, piece.local_start, piece.length)
        target.copy_(values.narrow(piece.dim, piece.hf_start, piece.length))


def _needs_gradient(module, inputs, out: Tensor) -> Tensor:
    return out.requires_grad_() if torch.is_grad_enabled() and not out.requires_grad else out


def _fingerprint(chunks: Sequence, hf: dict) -> int:
    """Return a number that depends on every bit of the whole model's weights, not on the layout.

    It is the sum of all elements' bits, each tensor's times a number made of its name, modulo 2^64.
    """
    total = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        for parameter, pieces, owner in local_pieces(chunks, hf):
            for piece in pieces if owner else ():
                values = parameter.narrow(piece.dim, piece.local_start, piece.length)
                bits = values.view(_BITS[values.itemsize]).sum(dtype=torch.int64)
                total += bits.cpu() * zlib.crc32(piece.hf_name.encode())
    device = next(chunks[0].parameters()).device
    total = total.to(device)
    dist.all_reduce(total)  # over all ranks, which hold parts of the model
    return int(total) % 2**64
