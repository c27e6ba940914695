"""A tiny DeepSeek-V3, and what ranks hold and need of it, for pushes without Megatron and vLLM."""

from typing import NamedTuple

import torch

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights import table
from megatron_r1.models.weights.layout import Shard, layout_from_table, stage_shards
from megatron_r1.models.weights.splits import Piece
from megatron_r1.models.weights.table import WeightTable
from megatron_r1.push.matching import TrainerGrid
from megatron_r1.push.matching.layouts import Coordinate
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.slots import Slot, SlotTable

SHAPE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 64,
    "vocab_size": 130,
}


class RankCoordinate(NamedTuple):
    """A trainer rank's number along the axes of its grid."""

    stage: int
    tensor: int
    expert: int
    expert_tensor: int


def rank_coordinate(grid: TrainerGrid, rank: int) -> RankCoordinate:
    """Return where a rank is, in Megatron-Core's default order."""
    expert, expert_tensor = divmod(rank % grid.expert_model, grid.expert_tensor)
    return RankCoordinate(rank // grid.stage_ranks, rank % grid.tensor, expert, expert_tensor)


def rank_tensors(
    hf_config: HFConfig,
    grid: TrainerGrid,
    rank: int,
    tensors: dict[str, torch.Tensor],
    *,
    with_mtp: bool = False,
    weight_table: WeightTable | None = None,
) -> dict[str, list[tuple[torch.Tensor, Piece]]]:
    """Return a trainer rank's parameters, in bfloat16, and their pieces, by HF name; those that
    `weight_table` lists, default the model's.

    Args:
        hf_config: the model's config.json.
        grid: the trainer's layout.
        rank: the trainer rank.
        tensors: the whole tensors by name.
        with_mtp: whether the MTP layers are among them.
        weight_table: the table of the weights, in place of the model's."""
    coordinate = rank_coordinate(grid, rank)
    (chunk,) = stage_shards(hf_config, grid.pipeline, with_mtp=with_mtp)[coordinate.stage]
    axes = {
        "tp": (coordinate.tensor, grid.tensor),
        "ep": (coordinate.expert, grid.expert),
        "etp": (coordinate.expert_tensor, grid.expert_tensor),
    }
    held: dict[str, list[tuple[torch.Tensor, Piece]]] = {}
    for entry in layout_from_table(
        weight_table or table.weight_table(hf_config), Shard(**{**vars(chunk), **axes})
    ).values():
        parameter = torch.zeros(entry.shape, dtype=torch.bfloat16)
        for piece in entry.pieces:
            part = tensors[piece.hf_name].narrow(piece.dim, piece.hf_start, piece.length)
            parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(part)
            held.setdefault(piece.hf_name, []).append((parameter, piece))
    return held


def slot_table(needs: PredictedSharding, coordinate: Coordinate) -> SlotTable:
    """Return the table of an engine rank's tensors in bfloat16, one after another."""
    slots, end = [], 0
    for tensor, region in needs.regions_of(coordinate):
        pitch = 2 * (region.right - region.left)
        corners = region.top, region.bottom, region.left, region.right
        slots.append(Slot(tensor.name, *corners, end, pitch, "bfloat16"))
        end += pitch * (region.bottom - region.top)
    return SlotTable(end, slots)
