"""The layout of this rank's model chunks, joined with their tensors."""

from collections.abc import Iterator, Sequence

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from megatron_r1.models.build import process_groups
from megatron_r1.models.weights.layout import LayoutEntry, Shard, layout
from megatron_r1.models.weights.rules import Piece


def local_pieces(
    model_chunks: Sequence, hf: dict
) -> Iterator[tuple[Tensor, tuple[Piece, ...], bool]]:
    """Yield (parameter, pieces, owner) for all parameters and router bias buffers of this rank.

    model_chunks: this rank's virtual pipeline stages, bare or wrapped. owner: exactly one rank of
    the job owns each piece, so the owners together write every HF tensor once. Raises ValueError
    for a parameter that no rule covers, and for one whose shape differs from its rule's."""
    groups = process_groups(model_chunks)
    for tensor, entry in local_entries(model_chunks, hf):
        # Replicas hold the same values; the first of them owns the pieces.
        replicas = groups.expt_dp if entry.expert else groups.dp_cp
        yield tensor, entry.pieces, entry.owner and replicas.rank() == 0


def local_entries(model_chunks: Sequence, hf: dict) -> Iterator[tuple[Tensor, LayoutEntry]]:
    """Yield (parameter, layout entry); order and errors as `local_pieces`."""
    for chunk in model_chunks:
        chunk = unwrap_model(chunk)
        tensors = model_tensors(chunk)
        entries = layout(hf, shard_of(chunk))
        if unruled := sorted(tensors.keys() - entries.keys()):
            raise ValueError(f"no weight rule covers the Megatron parameter {', '.join(unruled)}")
        if absent := sorted(entries.keys() - tensors.keys()):
            raise ValueError(
                f"the model has no parameter {', '.join(absent)}, which the table lists"
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
    bare: Module = unwrap_model(chunk)
    biases = {n: b for n, b in bare.named_buffers() if n.endswith(".expert_bias")}
    return {n: p for n, p in bare.named_parameters() if ".lora." not in n} | biases


def merged(parameter: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return parameter[rows, columns]: a view, or of a weight with an adapter the merged values."""
    adapter = getattr(parameter, "adapter", None)
    if adapter is None:
        return parameter.detach()[rows, columns]
    return adapter.merged(parameter.detach(), rows, columns)


def shard_of(chunk: Module) -> Shard:
    """Return the shard of this rank's model chunk, from the chunk and its process groups."""
    stage: GPTModel = unwrap_model(chunk)
    groups = process_groups([chunk])
    return Shard(
        layers=tuple(layer.layer_number - 1 for layer in stage.decoder.layers),
        embedding=stage.pre_process,
        final_norm=stage.decoder.final_layernorm is not None,
        head=stage.post_process,
        mtp=bool(stage.mtp_process),
        tp=(groups.tp.rank(), groups.tp.size()),
        ep=(groups.ep.rank(), groups.ep.size()),
        etp=(groups.expt_tp.rank(), groups.expt_tp.size()),
        transformer_engine=stage.config.transformer_impl == "transformer_engine",
    )


def has_mtp(model_chunks: Sequence) -> bool:
    """Whether the whole model, over all stages, was built with its MTP layers."""
    return bool(unwrap_model(model_chunks[0]).config.mtp_num_layers)
