"""The process groups of a transport between hosts, gloo's and NCCL's, and what travels in them.

A trainer rank and an engine rank that it sends to are a group of two, so that a lost rank breaks
its own pairs only. The ranks at one position of a set's engines are a group, too (`gloo`). A
push is its number, a stream of buckets, and a checksum of each delivery: one bucket is on the wire
while another is packed or unpacked (`gloo`).

With NCCL, buckets are packed and checksums computed on the GPUs, where the receive buffer is as
well. Numbers and checksums travel over a gloo group beside NCCL's, so that no GPU waits for a push
to begin. Buckets use gloo, too, between a trainer and an engine rank that share a GPU: NCCL refuses
such a pair."""

import datetime
from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_r1.weight_sync.rendezvous import Rendezvous
from megatron_r1.weight_sync.transports.base import gpu_uuid

ENGINE_RANK, TRAINER_RANK = 0, 1
"""The ranks of a pair in its group."""


class LinkEnd(Protocol):
    """The attributes of a link's end that its groups are created with.

    backend: "gloo" or "nccl". device: where buckets are packed and unpacked."""

    backend: str
    device: torch.device

    @property
    def rendezvous(self) -> Rendezvous: ...


class Groups(NamedTuple):
    """Two groups of the same ranks: for integers in host memory, and for buckets, on `device`."""

    control: dist.ProcessGroup
    data: dist.ProcessGroup
    device: torch.device

    def abort(self) -> None:
        for group in {self.control, self.data}:
            group.abort()


def pair_groups(end: LinkEnd, sender: int, engine_rank: int, *, is_sender: bool) -> Groups:
    """Return the groups of trainer rank `sender` and a rank of the rendezvous' engine."""
    name = f"pair/{sender}/{end.rendezvous.member}/{engine_rank}"
    rank = TRAINER_RANK if is_sender else ENGINE_RANK
    return create_groups(end, name, rank, 2, may_share_gpu=True)


def create_groups(
    end: LinkEnd, name: str, rank: int, size: int, *, may_share_gpu: bool = False
) -> Groups:
    """Return the groups of `size` ranks that meet under `name`.

    may_share_gpu: both ranks may be on one GPU."""
    rendezvous = end.rendezvous
    store = dist.PrefixStore(name, rendezvous.new_connection())
    timeout = datetime.timedelta(seconds=rendezvous.timeout_seconds)
    # The stubs give a backend no send and recv.
    control = cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))
    if end.backend == "gloo" or (may_share_gpu and _is_one_gpu(control, end.device)):
        return Groups(control, control, torch.device("cpu"))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=rendezvous.push_seconds)
    store = dist.PrefixStore("nccl", store)
    data = dist.ProcessGroupNCCL(store, rank, size, options)
    return Groups(control, cast(dist.ProcessGroup, data), end.device)


def wait_for(
    work: dist.Work,
    rendezvous: Rendezvous,
    more_seconds: float = 0.0,
    *,
    on_gpu: bool = False,
) -> None:
    """Wait for `work`, at most as long as a push may take, and `more_seconds`.

    on_gpu: the work is NCCL's."""
    if on_gpu:
        # Without a timeout, which would block the host; `create_groups` has set the group's.
        work.wait()
    else:
        work.wait(datetime.timedelta(seconds=rendezvous.push_seconds + more_seconds))


def integers(values: Iterable[int]) -> torch.Tensor:
    """Return integers of 64 bits, signed or not, as they are on the wire: int64."""
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], dtype=torch.int64)


def _is_one_gpu(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether both ranks of `group` compute on the same GPU."""
    own = torch.tensor(list(gpu_uuid(device).encode()))
    both = torch.empty(2 * len(own), dtype=own.dtype)
    group._allgather_base(both, own, AllgatherOptions()).wait()
    first, second = both.chunk(2)
    return torch.equal(first, second)
