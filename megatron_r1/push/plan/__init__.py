"""Decides which trainer rank sends which rectangle of which tensor to which engine rank, and when.

`planner` finds what each side holds and needs, `engine_sets` divides that among the engines of a
set and finds the senders. `rounds` has the order in which buckets travel over NCCL, and
`order_check` proves that it cannot wait in a circle. No torch."""

from megatron_r1.push.plan.planner import Planner
from megatron_r1.push.plan.ranks import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.push.plan.tensors import Region

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid"]
