"""Which trainer rank sends which slice of which tensor to which engine rank.

Pure Python and per rank: a rank plans its own sends or receives from the two layouts, and nobody
holds everybody's plan.
"""

from megatron_r1.weight_sync.plan.engine_layout import EngineLayout, EnginePlace
from megatron_r1.weight_sync.plan.plan import Planner, Transfer
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.trainer_grid import TrainerGrid

__all__ = ["EngineLayout", "EnginePlace", "Planner", "Region", "TrainerGrid", "Transfer"]
