"""The process groups of a push over gloo.

A trainer rank and an engine rank that it sends to are a group of two, so that a lost rank breaks
its own pairs only. The ranks at one position of a set's engines are a group, too. A push is its
number, a stream of buckets, and a checksum of each delivery: one bucket is on the wire while
another is packed or unpacked (`gloo`)."""

import datetime
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.rendezvous import Rendezvous

ENGINE_RANK, TRAINER_RANK = 0, 1
"""The ranks of a pair in its group."""


def pair_group(
    rendezvous: Rendezvous, sender: int, engine_rank: int, *, is_sender: bool
) -> dist.ProcessGroup:
    """Return the group of trainer rank `sender` and a rank of the rendezvous' engine."""
    name = f"pair/{sender}/{rendezvous.member}/{engine_rank}"
    return create_group(rendezvous, name, TRAINER_RANK if is_sender else ENGINE_RANK, 2)


def create_group(rendezvous: Rendezvous, name: str, rank: int, size: int) -> dist.ProcessGroup:
    """Return the group of `size` ranks that meet under `name`."""
    store = dist.PrefixStore(name, rendezvous.new_connection())
    timeout = datetime.timedelta(seconds=rendezvous.timeout_seconds)
    # The stubs give a backend no send and recv.
    return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))


def wait_for(work: dist.Work, rendezvous: Rendezvous, more_seconds: float = 0.0) -> None:
    """Wait for `work`, at most as long as a push may take, and `more_seconds`."""
    work.wait(datetime.timedelta(seconds=rendezvous.push_seconds + more_seconds))


def integers(values: Iterable[int]) -> torch.Tensor:
    """Return integers of 64 bits, signed or not, as they are on the wire: int64."""
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], dtype=torch.int64)
