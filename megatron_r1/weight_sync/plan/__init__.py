"""Decides which trainer rank sends which rectangle of which tensor to which engine rank.

Pure Python, except `receiver_layout`, which reads engines' tables. Each rank plans only its own
transfers from the two layouts; no process holds the whole plan."""

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.ranks import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.tensors import Region, Transfer

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid", "Transfer"]
