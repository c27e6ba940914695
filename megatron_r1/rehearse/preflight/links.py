"""Rates of the collectives that each parallel axis uses, and of the links between nodes.

A rate counts the bytes that one rank sends, as `megatron-r1 plan` does: an all-reduce of X bytes
over n ranks sends 2 X (n - 1) / n, an all-to-all X (n - 1) / n. All groups of an axis run at once,
as in a step, and share the adapters as they do there."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models import platform
from megatron_r1.rehearse.preflight.facts import LinkRate
from megatron_r1.rehearse.preflight.rank_placement import RankPlacement
from megatron_r1.rehearse.preflight.rank_progress import RankProgress

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

AXIS_COLLECTIVES = {
    "tensor": ("tp", "all-reduce"),
    "context": ("cp", "send/recv"),
    "expert": ("ep", "all-to-all"),
    "pipeline": ("pp", "send/recv"),
    "data": ("dp_cp", "all-reduce"),
}
"""Axis → the field of Megatron's ProcessGroupCollection, and what travels on it most."""
NUM_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
"""Bytes of the buffer that an operation moves."""
MEASURE_SECONDS = 0.5
"""About how long the timed operations of an axis take together."""
MAX_REPEATS = 50
PAIR_REPEATS = 8
GLOO_REPEATS = 4
"""Exchanges of a pair that are timed: fixed, as both of its ranks must make equally many."""
GLOO_TIMEOUT = timedelta(hours=1)
"""`progress` ends what hangs."""


def measure_axis(groups: "ProcessGroupCollection", axis: str) -> LinkRate | None:
    """Return the rate of this rank's group of an axis; None where it has one rank."""
    field, operation = AXIS_COLLECTIVES[axis]
    group = getattr(groups, field)
    size = dist.get_world_size(group)
    if size == 1:
        return None
    buffer = _new_buffer()
    run, fraction = _timed_operations(buffer, group, size)[operation]
    _measure_seconds(run, 1)  # not counted: NCCL connects the ranks
    # The slowest rank's time, so that all ranks of the group choose the same number of repeats:
    # each must take part in every collective.
    once = _slowest_seconds(_measure_seconds(run, 1), group)
    repeats = max(1, min(MAX_REPEATS, int(MEASURE_SECONDS / once)))
    seconds = _slowest_seconds(_measure_seconds(run, repeats), group) / repeats
    rate = buffer.nbytes * fraction / seconds
    return LinkRate(operation, dist.get_process_group_ranks(group), rate)


def pair_rates(placement: RankPlacement) -> list[float]:
    """Return the rates between this rank and the rank of the same number on each neighboring node.
    A node whose adapter is slow is slow to both neighbors."""
    rates = []
    for node in ring_partners(placement.node, placement.num_nodes):
        if node is not None:
            partner = node * placement.local_world_size + placement.local_rank
            buffer = _new_buffer()
            exchange = partial(
                _send_and_receive, buffer, partner, torch.empty_like(buffer), partner
            )
            _measure_seconds(exchange, 1)  # not counted: NCCL connects the ranks
            rates.append(PAIR_REPEATS * buffer.nbytes / _measure_seconds(exchange, PAIR_REPEATS))
    return rates


def gloo_rates(placement: RankPlacement, progress: RankProgress) -> list[float]:
    """Return the rates of `pair_rates` over gloo, through host memory. On a single node they are
    those between neighboring ranks.

    All ranks begin at once, so that the ranks of a node share the node's interface. Each pair is a
    group of its own, as in a push."""
    is_single = placement.num_nodes == 1
    position, count = (
        (placement.rank, placement.world_size)
        if is_single
        else (placement.node, placement.num_nodes)
    )
    rates = []
    for number, neighbor in enumerate(ring_partners(position, count)):
        exchange = None
        if neighbor is not None:
            partner = (
                neighbor
                if is_single
                else neighbor * placement.local_world_size + placement.local_rank
            )
            exchange = _gloo_exchange(placement.rank, partner, progress.store)
        progress.barrier(f"gloo, round {number}")
        if exchange is not None:
            num_bytes = GLOO_REPEATS * NUM_BYTES[platform.device().type]
            rates.append(num_bytes / _measure_seconds(exchange, GLOO_REPEATS))
    return rates


def _gloo_exchange(rank: int, partner: int, store: dist.Store) -> Callable[[], None]:
    """Connect two ranks; return what sends a buffer each way between them."""
    pair = sorted((rank, partner))
    meeting = dist.PrefixStore("gloo/{}/{}".format(*pair), store)
    # Not `new_group`: it names a group by how many its ranks are in, and these differ. The stubs
    # give a backend no send and recv.
    backend = dist.ProcessGroupGloo(meeting, pair.index(rank), 2, GLOO_TIMEOUT)
    group, peer = cast(ProcessGroup, backend), 1 - pair.index(rank)
    sent = _new_buffer().cpu()
    received = torch.empty_like(sent)

    def exchange() -> None:
        for work in group.send([sent], peer, 0), group.recv([received], peer, 0):
            work.wait()

    return exchange


def ring_partners(node: int, num_nodes: int) -> list[int | None]:
    """Return the node's partner in each of three rounds, or None: the links of a ring, in rounds
    of separate pairs."""
    partners: list[int | None] = [None] * 3
    for first in range(num_nodes if num_nodes > 2 else num_nodes - 1):
        second, closes = (first + 1) % num_nodes, first == num_nodes - 1
        pair = (first, second)
        if node in pair:
            turn = 2 if closes and num_nodes % 2 else first % 2
            partners[turn] = pair[1 - pair.index(node)]
    return partners


def _new_buffer() -> Tensor:
    device = platform.device()
    return torch.zeros(NUM_BYTES[device.type] // 4, device=device)


def _timed_operations(
    buffer: Tensor, group: ProcessGroup, size: int
) -> dict[str, tuple[Callable[[], object], float]]:
    """Return each operation over `group`, with the bytes that a rank sends as a share of the
    buffer's."""
    buffer = buffer[: len(buffer) // size * size]
    received = torch.empty_like(buffer)
    ranks = dist.get_process_group_ranks(group)
    position = ranks.index(dist.get_rank())
    target, source = ranks[(position + 1) % size], ranks[position - 1]
    return {
        # Over the axis: every rank adds to the sum.
        "all-reduce": (lambda: dist.all_reduce(buffer, group=group), 2 * (1 - 1 / size)),
        # Over the axis: every rank has a part for every other.
        "all-to-all": (lambda: dist.all_to_all_single(received, buffer, group=group), 1 - 1 / size),
        # Along the axis: every rank sends to the next one, the last to the first.
        "send/recv": (lambda: _send_and_receive(buffer, target, received, source), 1.0),
    }


def _send_and_receive(
    sent_buffer: Tensor, target: int, received_buffer: Tensor, source: int
) -> None:
    """Send to rank `target` of the default group and receive from `source`; all ranks of an axis
    call this at once."""
    requests = [
        dist.P2POp(dist.isend, sent_buffer, target),
        dist.P2POp(dist.irecv, received_buffer, source),
    ]
    for request in dist.batch_isend_irecv(requests):
        request.wait()


def _measure_seconds(run: Callable[[], object], repeats: int) -> float:
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    platform.synchronize()
    return max(time.perf_counter() - start, 1e-9)


def _slowest_seconds(seconds: float, group: ProcessGroup) -> float:
    value = torch.tensor([seconds], device=platform.device(), dtype=torch.float32)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)  # over the axis: a common time
    return float(value)
