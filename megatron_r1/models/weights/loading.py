"""The tensors of this rank's model chunks: where each stands in the weight table, and their import.
One replica reads each slice of a checkpoint and sends it to the others, so that a job reads each
byte once at any number of replicas."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.build import process_groups
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.layout import LayoutEntry, Shard, hf_tensors, parameter_layout
from megatron_r1.models.weights.splits import Piece, Shape
from megatron_r1.models.weights.table import SCORE


def local_pieces(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig
) -> Iterator[tuple[Tensor, tuple[Piece, ...], bool]]:
    """Yield (parameter, pieces, owner) for all parameters and router bias buffers of this rank.

    `owner` says whether this rank owns the pieces: exactly one rank of the job owns each piece, so
    the owners together write every HF tensor once.

    Args:
        model_chunks: this rank's virtual pipeline stages, bare or wrapped.
        hf_config: the model's `config.json`.

    Raises:
        ValueError: for a parameter that no rule covers, and for one whose shape differs from its
            rule's."""
    for tensor, entry in local_entries(model_chunks, hf_config):
        # Replicas hold the same values; the first of them owns the pieces.
        first = _replica_group(model_chunks, entry).rank() == 0
        yield tensor, entry.pieces, entry.is_owner and first


def _replica_group(
    model_chunks: Sequence[torch.nn.Module], entry: LayoutEntry
) -> dist.ProcessGroup:
    """Return the ranks that hold the same values of a tensor."""
    groups = process_groups(model_chunks)
    return groups.expt_dp if entry.is_expert else groups.dp_cp


def local_entries(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig
) -> Iterator[tuple[Tensor, LayoutEntry]]:
    """Yield (parameter, layout entry); order and errors as `local_pieces`."""
    for chunk in model_chunks:
        chunk = unwrap_model(chunk)
        tensors = model_tensors(chunk)
        entries = parameter_layout(hf_config, chunk_shard(chunk))
        if unruled_names := sorted(tensors.keys() - entries.keys()):
            raise ValueError(
                f"no weight rule covers the Megatron parameter {', '.join(unruled_names)}"
            )
        if absent_names := sorted(entries.keys() - tensors.keys()):
            raise ValueError(
                f"the model has no parameter {', '.join(absent_names)}, which the table lists"
            )
        for name, entry in entries.items():
            if tuple(tensors[name].shape) != entry.shape:
                raise ValueError(
                    f"Megatron parameter {name} has shape {tuple(tensors[name].shape)}, "
                    f"the weight table gives {entry.shape}"
                )
            yield tensors[name], entry


def model_tensors(chunk: Module) -> dict[str, Tensor]:
    """Return this rank's tensors that the weight table covers: parameters, router bias buffers;
    without adapters, which have a table of their own."""
    bare_module: Module = unwrap_model(chunk)
    biases = {n: b for n, b in bare_module.named_buffers() if n.endswith(".expert_bias")}
    return {n: p for n, p in bare_module.named_parameters() if ".lora." not in n} | biases


def merge_adapter(parameter: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return parameter[rows, columns]: a view, or of a weight with an adapter the merged values.

    Args:
        parameter: (M, N), with or without an adapter.
        rows: which rows of the parameter.
        columns: which columns of the parameter.
    """
    adapter = getattr(parameter, "adapter", None)
    if adapter is None:
        return parameter.detach()[rows, columns]
    return adapter.merge(parameter.detach(), rows, columns)


def chunk_shard(chunk: Module) -> Shard:
    """Return the shard of this rank's model chunk, from the chunk and its process groups."""
    model: GPTModel = unwrap_model(chunk)
    groups = process_groups([chunk])
    return Shard(
        layers=tuple(layer.layer_number - 1 for layer in model.decoder.layers),
        embedding=model.pre_process,
        final_norm=model.decoder.final_layernorm is not None,
        head=model.post_process,
        mtp=bool(model.mtp_process),
        tp=(groups.tp.rank(), groups.tp.size()),
        ep=(groups.ep.rank(), groups.ep.size()),
        etp=(groups.expt_tp.rank(), groups.expt_tp.size()),
        transformer_engine=model.config.transformer_impl == "transformer_engine",
    )


def has_mtp(model_chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether the whole model, over all stages, was built with its MTP layers."""
    return bool(unwrap_model(model_chunks[0]).config.mtp_num_layers)


def load_hf(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    path: str | Path,
    stored: HFConfig | None = None,
) -> None:
    """Fill this rank's parameters, in their dtype, from the safetensors checkpoint in `path`; call
    on every rank.

    FP8 checkpoints (fp8.py) are dequantized. MTP layers' copies of the embedding and head are
    ignored. Vocabulary padding becomes zero.

    Args:
        model_chunks: this rank's virtual pipeline stages, bare or wrapped.
        hf_config: the model's `config.json`.
        path: the checkpoint's folder.
        stored: the configuration of the checkpoint, where that is the language model that a score
            model `hf_config` starts from; its heads are ignored and the score head's weights are
            not changed.

    Raises:
        UserError: naming every missing, unexpected or mis-shaped tensor."""
    _load_weights(model_chunks, hf_config, HFWeights(path, stored or hf_config))


def load_megatron(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    path: str | Path,
    stored: HFConfig | None = None,
) -> None:
    """Fill this rank's parameters from the weights in the Megatron checkpoint `path`.

    It may have been saved at any layout, with Megatron's own or Transformer Engine's layers; other
    content (optimizer, reference) is ignored.

    Args:
        model_chunks: this rank's virtual pipeline stages, bare or wrapped.
        hf_config: the model's `config.json`.
        path: the checkpoint's folder.
        stored: the configuration of the checkpoint where it is another model, as in `load_hf`.

    Raises:
        UserError: naming every missing, unexpected or mis-shaped tensor."""
    _load_weights(model_chunks, hf_config, MegatronWeights(path, stored or hf_config))


def initialize_score_head(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig, *, std: float, seed: int
) -> None:
    """Draw the head of a score model from N(0, std^2), the same for every parallel layout.

    Args:
        model_chunks: this rank's virtual pipeline stages.
        hf_config: the model's `config.json`.
        std: standard deviation of the weights.
        seed: seed of the generator, together with the tensor's name."""
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf_config):
            if [piece.hf_name for piece in pieces] == [SCORE]:
                parameter.copy_(_draw_normal(SCORE, tuple(parameter.shape), std, seed))


def _load_weights(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    weights: HFWeights | MegatronWeights,
) -> None:
    lacks_score_head = has_score_head(hf_config) and not has_score_head(weights.hf_config)
    with weights, torch.no_grad():
        weights.check(has_mtp(model_chunks))
        entries = [
            (parameter, entry.pieces, _replica_group(model_chunks, entry))
            for parameter, entry in local_entries(model_chunks, hf_config)
            if not (lacks_score_head and [piece.hf_name for piece in entry.pieces] == [SCORE])
        ]

        def read() -> None:
            for index, (parameter, pieces, replicas) in enumerate(entries):
                if index % replicas.size() != replicas.rank():
                    continue
                _zero_padding(parameter, pieces)
                for piece in pieces:
                    values = weights.read(piece.hf_name, piece.dim, piece.hf_start, piece.length)
                    parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)

        # All read, side by side, before any sends.
        _on_every_rank(read)
        for index, (parameter, _, replicas) in enumerate(entries):
            if replicas.size() > 1:
                # Over the ranks with the same part of the tensor: one of them has read it.
                source = dist.get_global_rank(replicas, index % replicas.size())
                dist.broadcast(parameter.detach(), source, group=replicas)


def _on_every_rank(action: Callable[[], None]) -> None:
    """Run `action` on every rank and wait for all.

    Raises:
        UserError: that of any rank, on all ranks.
    """
    failure = None
    try:
        action()
    except UserError as error:
        failure = str(error), error.key, error.cause
    failures: list[tuple[str, str, Cause] | None] = [failure]
    if dist.is_initialized() and dist.get_world_size() > 1:
        failures = [None] * dist.get_world_size()
        # Over all ranks: a rank that waited for the tensors of one that has failed would not end.
        dist.all_gather_object(failures, failure)
    for rank_failure in failures:
        if rank_failure is not None:
            text, key, cause = rank_failure
            raise UserError(text, key=key, cause=cause)


def initialize_weights(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig, *, std: float, seed: int
) -> None:
    """Fill this rank's parameters with random weights, the same for every parallel layout.

    Matrices are drawn from N(0, std^2), each HF tensor from a generator seeded by `seed` and its
    name; norms become 1, biases 0. Each tensor is drawn whole, in fp32, one at a time.

    Args:
        model_chunks: this rank's virtual pipeline stages.
        hf_config: the model's `config.json`.
        std: standard deviation of the matrices.
        seed: an integer, the same on every rank."""
    shapes = hf_tensors(hf_config)
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf_config):
            _zero_padding(parameter, pieces)
            for piece in pieces:
                shape = shapes[piece.hf_name][0]
                if len(shape) == 1:
                    values = torch.full(shape, float(piece.hf_name.endswith("norm.weight")))
                else:
                    values = _draw_normal(piece.hf_name, shape, std, seed)
                values = values.narrow(piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def _draw_normal(name: str, shape: Shape, std: float, seed: int) -> torch.Tensor:
    # A CPU's numbers, also with a GPU; crc32, because hash() is salted in every process.
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _zero_padding(parameter: torch.Tensor, pieces: Sequence[Piece]) -> None:
    if sum(piece.length for piece in pieces) < parameter.shape[pieces[0].dim if pieces else 0]:
        parameter.zero_()
