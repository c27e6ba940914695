"""Decides which trainer rank sends which rectangle of which tensor to which engine rank.

Pure Python, except `receiver_layout`, which reads engines' tables. Each rank plans only its own
transfers from the two layouts; no process holds the whole plan.
"""

from megatron_r1.weight_sync.plan.engine_layout import Coordinate, EngineLayout
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.region import Region, Transfer
from megatron_r1.weight_sync.plan.trainer_grid import TrainerGrid

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid", "Transfer"]
