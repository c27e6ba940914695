"""Decides which trainer rank sends which rectangle of which tensor to which engine rank.

Pure Python, except `receiver_layout`, which reads engines' tables. `engine_sets` has the plan of a
push; every trainer rank computes the same one from both layouts."""

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.ranks import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.tensors import Region

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid"]
