"""The layout of this rank's model chunks, joined with their tensors."""

from collections.abc import Iterator, Sequence

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.weights.layout import Entry, Shard, layout
from megatron_r1.weights.rules import Piece


def local_pieces(
    model_chunks: Sequence, hf: dict
) -> Iterator[tuple[Tensor, tuple[Piece, ...], bool]]:
    """Yield (parameter, pieces, owner) for all parameters and router bias buffers of this rank.

    model_chunks: this rank's virtual pipeline stages, bare or wrapped. owner: exactly one rank of
    the job owns each piece, so the owners together write every HF tensor once. Raises ValueError
    for a parameter that no rule covers, and for one whose shape differs from its rule's."""
    for tensor, entry in local_entries(model_chunks, hf):
        yield tensor, entry.pieces, entry.owner and _first_replica(entry.expert)


def local_entries(model_chunks: Sequence, hf: dict) -> Iterator[tuple[Tensor, Entry]]:
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


def model_tensors(chunk) -> dict[str, Tensor]:
    """Return the tensors that the weight table covers: parameters and router bias buffers."""
    chunk = unwrap_model(chunk)
    biases = {n: b for n, b in chunk.named_buffers() if n.endswith(".expert_bias")}
    return dict(chunk.named_parameters()) | biases


def shard_of(chunk) -> Shard:
    """Return the shard of this rank's model chunk, from the chunk and Megatron's process groups."""
    chunk = unwrap_model(chunk)
    return Shard(
        layers=tuple(layer.layer_number - 1 for layer in chunk.decoder.layers),
        embedding=chunk.pre_process,
        final_norm=chunk.decoder.final_layernorm is not None,
        head=chunk.post_process,
        mtp=bool(chunk.mtp_process),
        tp=(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        ep=(
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        ),
        etp=(
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        ),
        transformer_engine=chunk.config.transformer_impl == "transformer_engine",
    )


def has_mtp(model_chunks: Sequence) -> bool:
    """Whether the whole model, over all stages, was built with its MTP layers."""
    return bool(unwrap_model(model_chunks[0]).config.mtp_num_layers)


def _first_replica(expert: bool) -> bool:
    if expert:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
