"""Decides which trainer rank sends which rectangle of which tensor to which engine rank, and when.

`planner` finds what each side holds and needs, `engine_sets` divides that among the engines of a
set and finds the senders. `rounds` has the order in which buckets travel over NCCL, of which
`tools/bench/push/order_check.py` proves that it cannot wait in a circle. `from_recipe` plans and
checks the push of a recipe before any engine runs, `adapters` one of adapters alone. No torch.

Seven words besides those of `megatron_r1.push`:

- member: an engine of a set, by its number there.
- position: a rank's number within its engine. A set's ranks at one position need the same bytes.
- share: the bytes of a position that enter one member from trainer ranks; it passes them on.
- replicas: the trainer ranks that hold the same piece of a tensor; any of them can send it.
- part: a region with its bytes on the wire.
- bundle: the parts of a share that one sender sends.
- entry: all parts that one trainer rank sends to one engine rank.

A position needs parts; a sender's parts are bundles, and the bundles that enter a member are its
share. Before senders are chosen, `engine_sets.HeldParts` has a position's or a share's parts, by
the replicas that hold them."""

from megatron_r1.push.plan.planner import Coordinate, EngineLayout, Planner, TrainerGrid
from megatron_r1.push.plan.tensors import Region

__all__ = ["Coordinate", "EngineLayout", "Planner", "Region", "TrainerGrid"]
