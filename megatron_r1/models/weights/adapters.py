"""Low-rank adapters (LoRA) of a rank's linear layers: y = W x + alpha / rank B A x. One layer's
factors, their product and the merged weight (`Adapter`); adapters for this rank's model chunks,
and the fingerprint of the model that they belong to (`attach_adapters`); export of the adapters
alone, in PEFT's format (`save_adapter`).

Every Hugging Face layer has factors of its own, as in PEFT, also where Megatron computes several
layers as one (query, key and value; gate and up). `adapter_table` has their rules. docs/lora.md
has settings and limits."""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from megatron_r1.base.files import atomic_write
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.build import process_groups
from megatron_r1.models.gradients import copy_gradient_attributes
from megatron_r1.models.weights.adapter_table import (
    PEFT_PREFIX,
    A,
    B,
    adapter_config,
    adapter_shapes,
    adapter_table,
)
from megatron_r1.models.weights.export import write_folder, write_pieces
from megatron_r1.models.weights.formats.tensor_files import plan_file
from megatron_r1.models.weights.layout import LayoutEntry, layout_from_table
from megatron_r1.models.weights.loading import chunk_shard, local_pieces
from megatron_r1.models.weights.table import Piece, Shape


class Adapter(torch.nn.Module):
    """The product scale B A for the weights that a layer has on this rank.

    Both matrices have the dtype and device of `weight`; a is not initialized, b is 0.

    Attributes:
        a: (blocks x rank, in), a block per Hugging Face layer in the weight.
        b: (out, rank); a row multiplies its own layer's block.
        group: the tensor ranks that share the weight. Under sequence parallelism (`by_sequence`)
            each of these ranks has a part of the tokens, of routed experts all tokens."""

    _blocks: Tensor

    def __init__(
        self,
        entries: tuple[LayoutEntry, LayoutEntry],
        weight: Tensor,
        scale: float,
        group: torch.distributed.ProcessGroup,
        by_sequence: bool,
    ):
        super().__init__()
        self.entries, self.scale, self.group = entries, scale, group
        of_a, of_b = entries
        self.a = torch.nn.Parameter(
            torch.empty(of_a.shape, dtype=weight.dtype, device=weight.device)
        )
        self.b = torch.nn.Parameter(
            torch.zeros(of_b.shape, dtype=weight.dtype, device=weight.device)
        )
        for factor, entry in ((self.a, of_a), (self.b, of_b)):
            copy_gradient_attributes(
                factor, weight, counts=not entry.is_replicated or group.rank() == 0
            )
        blocks = _blocks(of_a, of_b)
        self._is_plain = blocks.shape[1] == 1 and bool(blocks.all())
        self.register_buffer("_blocks", blocks.to(self.b), persistent=False)
        # A rank's gradient of a replicated factor is then a part of the whole: of other tokens, or
        # through other features.
        self._sums_gradients = by_sequence or of_a.is_expert
        self._communicate = (
            None if of_a.is_expert else _factor_communication(of_a, of_b, by_sequence)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, (..., out), for its input, (..., in)."""
        a, b = self.a, self._as_matrix()
        if self._sums_gradients:
            share = partial(copy_to_tensor_model_parallel_region, group=self.group)
            a = share(a) if self.entries[0].is_replicated else a
            b = share(b) if self.entries[1].is_replicated else b
        hidden = linear(x, a)
        if self._communicate is not None:
            hidden = self._communicate(hidden, group=self.group)
        return linear(hidden * self.scale, b)

    @torch.no_grad()
    def merge(self, weight: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return weight[rows, columns] with the adapter's product, which is computed in fp32.

        Args:
            weight: (out, in), the frozen weight.
            rows: which rows.
            columns: which columns."""
        b, a = self._as_matrix()[rows].float(), self.a[:, columns].float()
        return weight[rows, columns].float().addmm(b, a, alpha=self.scale).to(weight.dtype)

    def _as_matrix(self) -> Tensor:
        """Return B as one matrix (out, blocks x rank), with zeros outside each row's block."""
        if self._is_plain:
            return self.b
        return (self._blocks[:, :, None] * self.b[:, None]).flatten(1)


def _blocks(of_a: LayoutEntry, of_b: LayoutEntry) -> Tensor:
    """Return (out, blocks), 1 where a row of B belongs to a block of A."""
    names = [piece.hf_name.removesuffix(A) for piece in of_a.pieces]
    mask = torch.zeros(of_b.shape[0], len(names))
    for piece in of_b.pieces:
        end = piece.local_start + piece.length
        mask[piece.local_start : end, names.index(piece.hf_name.removesuffix(B))] = 1
    return mask


def _factor_communication(
    of_a: LayoutEntry, of_b: LayoutEntry, by_sequence: bool
) -> Callable[..., Tensor] | None:
    """Return the communication between the factors A and B: what the layer does with its input or
    output of all features, done with the `rank` features of a token, or None if both are whole."""
    if of_a.is_replicated and of_b.is_replicated:
        return None
    if of_a.is_replicated:  # column-parallel
        if by_sequence:
            return partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region
    if by_sequence:
        return reduce_scatter_to_sequence_parallel_region
    return reduce_from_tensor_model_parallel_region


_BITS = {2: torch.int16, 4: torch.int32}


def attach_adapters(chunks: Sequence, hf: dict, lora: LoraConfig, seed: int) -> None:
    """Freeze the loaded model and give its target layers adapters; call before DDP.

    A is drawn as in PEFT, uniformly with the variance 1 / (3 in) of Kaiming's rule for a = sqrt(5),
    each Hugging Face tensor from a generator of its own; B is 0, so that nothing has changed yet.

    Args:
        chunks: this rank's virtual stages.
        hf: the model's `config.json`.
        lora: rank, scale and targets.
        seed: the seed of the draws of A.

    Raises:
        UserError: for an unknown target.
    """
    table, fingerprint = adapter_table(hf, lora), _fingerprint(chunks, hf)
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
                of_a, of_b = entries[name], entries[f"{name[:-1]}b"]
                weight = getattr(chunk.get_submodule(path), f"weight{number.rstrip('.')}")
                adapter = _adapter(chunk, weight, of_a, of_b, lora)
                _initialize(adapter, shapes, seed)
                by_layer[path].append(adapter)
        for path, adapters in by_layer.items():
            _attach(chunk.get_submodule(path), adapters)
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
        replicas = groups.expt_dp if entry.is_expert else groups.dp_cp
        yield factor, entry.pieces, entry.is_owner and replicas.rank() == 0


def _adapter(
    chunk: GPTModel, weight: Tensor, of_a: LayoutEntry, of_b: LayoutEntry, lora: LoraConfig
) -> Adapter:
    groups = process_groups([chunk])
    group = groups.expt_tp if of_a.is_expert else groups.tp
    by_sequence = chunk.config.sequence_parallel and not of_a.is_expert
    adapter = Adapter((of_a, of_b), weight, lora.scale, group, by_sequence)
    weight.adapter = adapter  # type: ignore[attr-defined]  # what pushes and exports merge
    return adapter


def _attach(layer: torch.nn.Module, adapters: list[Adapter]) -> None:
    if hasattr(layer, "weight"):
        layer.add_module("lora", adapters[0])
        layer.register_forward_hook(add_product)
    else:
        layer.add_module("lora", torch.nn.ModuleList(adapters))
        layer.register_forward_hook(add_products)


def add_product(layer: Any, inputs: tuple, out: tuple) -> tuple:
    """Return the output of a linear layer, (values, bias), with its adapter's product added to the
    values.

    Args:
        layer: the linear layer.
        inputs: its arguments; the first has shape (..., in).
        out: its output, (values, bias)."""
    x = inputs[0]
    if (norm := getattr(layer, "layer_norm_weight", None)) is not None:
        # Transformer Engine has the norm before a layer in it.
        x = rms_norm(x, tuple(norm.shape), norm, layer.eps)
    return out[0] + layer.lora(x), *out[1:]


def add_products(layer: Any, inputs: tuple, out: tuple) -> tuple:
    """Return the output of a layer of all experts, (values, bias), with the adapters' products
    added to the values.

    Args:
        layer: the layer of all experts.
        inputs: tokens by expert, and each expert's number of tokens.
        out: the layer's own output, (values, bias)."""
    x, counts = inputs[:2]
    shares = zip(layer.lora, x.split(counts), strict=True)
    parts = [adapter(tokens) for adapter, tokens in shares]
    return out[0] + torch.cat(parts), *out[1:]


@torch.no_grad()
def _initialize(adapter: Adapter, shapes: dict[str, Shape], seed: int) -> None:
    for piece in adapter.entries[0].pieces:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{piece.hf_name}".encode()))
        shape = shapes[piece.hf_name]
        bound = shape[1] ** -0.5
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        target = adapter.a.narrow(piece.dim, piece.local_start, piece.length)
        target.copy_(values.narrow(piece.dim, piece.hf_start, piece.length))


def _needs_gradient(module: torch.nn.Module, inputs: tuple, out: Tensor) -> Tensor:
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


def save_adapter(
    chunks: Sequence, hf: dict, lora: LoraConfig, base: str, out: Path, dtype: torch.dtype
) -> None:
    """Write `out`, which peft.PeftModel.from_pretrained loads; call on every rank.

    The folder appears complete or not at all (an existing one is replaced).

    Args:
        chunks: this rank's virtual stages.
        hf: the model's `config.json`.
        lora: rank, scale and targets.
        base: the folder of the model that the adapters belong to.
        out: the new folder.
        dtype: the dtype of the written factors.

    Raises:
        UserError: on every rank when something cannot be written.
    """
    table = adapter_table(hf, lora)
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
