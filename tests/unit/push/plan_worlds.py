"""Models, trainers and engines for which pushes are planned, and what each trainer rank holds."""

from collections import defaultdict

from weight_shards import shard

from megatron_r1.models import read_hf_config
from megatron_r1.models.weights import parameter_layout
from megatron_r1.push.matching import EngineLayout, Region, TrainerGrid
from tests.unit.push.push_models import DEEPSEEK_MTP, QWEN
from tools.bench.push.small_model import rank_coordinate

DEEPSEEK_V3 = read_hf_config("examples/deepseek_r1/model")
WORLDS = [
    (DEEPSEEK_MTP, TrainerGrid(1), EngineLayout()),
    (DEEPSEEK_MTP, TrainerGrid(4, tensor=2, expert=2), EngineLayout(2, tensor_parallel=2)),
    (
        DEEPSEEK_MTP,
        TrainerGrid(8, pipeline=2, expert=4),
        EngineLayout(3, tensor_parallel=2, data_parallel=2),
    ),
    (
        DEEPSEEK_MTP,
        TrainerGrid(8, tensor=2, context=2, pipeline=2),
        EngineLayout(2, tensor_parallel=4),
    ),
    (
        DEEPSEEK_MTP,
        TrainerGrid(8, expert=2, expert_tensor=2),
        EngineLayout(1, tensor_parallel=2, pipeline_parallel=3),
    ),
    (DEEPSEEK_MTP, TrainerGrid(4, tensor=4), EngineLayout(2, 2, 2, 2, expert_parallel=True)),
    (
        DEEPSEEK_MTP,
        TrainerGrid(8, expert=8),
        EngineLayout(2, data_parallel=3, expert_parallel=True),
    ),
    (
        QWEN,
        TrainerGrid(4, tensor=2, pipeline=2),
        EngineLayout(2, tensor_parallel=4, pipeline_parallel=2),
    ),
    (QWEN, TrainerGrid(2), EngineLayout(1, tensor_parallel=2)),
]


def held(hf_config: dict, grid: TrainerGrid, rank: int) -> dict[str, list[Region]]:
    """Return what a trainer rank holds, from the layout that real models are checked against."""
    place = rank_coordinate(grid, rank)
    at = shard(
        hf_config,
        tp=(place.tensor, grid.tensor),
        pp=(place.stage, grid.pipeline),
        ep=(place.expert, grid.expert),
        etp=(place.expert_tensor, grid.expert_tensor),
    )
    regions = defaultdict(list)
    for entry in parameter_layout(hf_config, at).values():
        for piece in entry.pieces:
            # Only rectangles are compared here: the other dimension is whole.
            shape = entry.shape if piece.dim == 0 else (entry.shape[0], None)
            other = shape[1] if piece.dim == 0 and len(shape) > 1 else entry.shape[0]
            run = (piece.hf_start, piece.hf_start + piece.length)
            whole = (0, other if len(entry.shape) > 1 else 1)
            regions[piece.hf_name].append(
                Region(*run, *whole) if piece.dim == 0 else Region(*whole, *run)
            )
    return regions
