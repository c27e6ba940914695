"""Decides which trainer rank sends which rectangle of which tensor to which engine rank, and when.

`tensors` has the tensors and `regions` the rectangles. `layouts` says where each rank is,
`predicted_sharding` what an engine rank needs, `matched_regions` which regions of what trainer
ranks hold must move; `planned_links` divides that among the engines of a set and finds the senders.
`rounds` has the order in which buckets travel over NCCL, of which
`tools/bench/push/schedule_check.py` proves that it cannot deadlock. `recipe_plan` plans and checks
the push of a recipe before any engine runs, `adapter_push` one of adapters alone. No torch.

Replicas are the trainer ranks that hold the same piece of a tensor; any of them can send it."""

from megatron_r1.push.matching.layouts import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.push.matching.matched_regions import MatchedRegions
from megatron_r1.push.matching.regions import Region

__all__ = ["Coordinate", "EngineLayout", "MatchedRegions", "Region", "TrainerGrid"]
