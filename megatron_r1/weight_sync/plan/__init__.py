"""Decides which trainer rank sends which rectangle of which tensor to which engine rank.

Pure Python, except `receiver_layout`, which reads engines' tables. `planner` finds what each side
holds and needs, `bundles` divides that among the engines of a set, and `engine_sets` finds a sender
for each bundle. Every trainer rank computes
the same plan from both layouts."""

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.ranks import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.tensors import Region

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid"]
