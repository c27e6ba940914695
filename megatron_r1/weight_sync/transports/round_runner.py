"""Runs the rounds of a push that one process takes part in (`plan.rounds`), on two streams.

All groups of NCCL calls are on one stream, one after another; buckets are packed and unpacked on
the other. That one never waits for a peer: what a round has received is unpacked once the host has
seen that the round has ended. Meanwhile the next round is enqueued already. So a peer that does not
come holds up nothing but the stream of the transfers, until its communicator is aborted."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from megatron_r1.weight_sync.transports import ROUNDS_AHEAD
from megatron_r1.weight_sync.transports.communicator import Communicator
from megatron_r1.weight_sync.transports.nccl_library import Memory


class PushStreams:
    """A GPU's streams for packing and for transfers; it becomes the thread's current GPU."""

    def __init__(self, device: int) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", device)
        # Of high priority: others take theirs from torch's pool of the ordinary ones.
        self._copies, self._transfers = (torch.cuda.Stream(device, priority=-1) for _ in range(2))

    def copying(self) -> contextlib.AbstractContextManager:
        """Return the context in which copies are enqueued."""
        return torch.cuda.stream(self._copies)

    def copies_follow(self) -> None:
        """Let what is copied from now on be what the current stream has written by then."""
        self._copies.wait_stream(torch.cuda.current_stream())

    def transfers_follow(self) -> int:
        """Let transfers from now on wait for what is copied by now; return their stream."""
        self._transfers.wait_stream(self._copies)
        return self._transfers.cuda_stream

    def transfers_ended(self) -> Callable[[], bool]:
        """Return a function that says whether the transfers enqueued by now have ended."""
        return self._transfers.record_event().query

    def copies_ended(self) -> Callable[[], bool]:
        """Return a function that says whether the copies enqueued by now have ended."""
        return self._copies.record_event().query


class Packs(Protocol):
    """A block that a process has."""

    def pack(self, start: int, end: int, target: torch.Tensor) -> None: ...


class Unpacks(Protocol):
    """A block that a process receives."""

    def unpack(self, start: int, end: int, source: torch.Tensor) -> None: ...


class Sent(NamedTuple):
    """Bytes [start, end) of a block for a rank."""

    peer: int
    block: Packs
    start: int
    end: int


class Received(NamedTuple):
    """Bytes [start, end) of a block from a rank."""

    peer: int
    block: Unpacks
    start: int
    end: int


class Round(NamedTuple):
    """What a process sends and receives in one group."""

    communicator: Communicator
    sent: Sent | None
    received: Received | None


class RoundRunner:
    """Runs rounds, with buffers for each direction of `ROUNDS_AHEAD` of them.

    rounds: all that it will run."""

    def __init__(self, streams: PushStreams, rounds: Sequence[Round]):
        self._streams = streams
        halves = [half for each in rounds for half in (each.sent, each.received) if half]
        bucket_bytes = max((half.end - half.start for half in halves), default=0)
        with streams.copying():
            memory = torch.empty(
                (ROUNDS_AHEAD, 2, bucket_bytes), dtype=torch.uint8, device=streams.device
            )
        self._free = deque(memory.unbind())

    def run(self, rounds: Iterable[Round]) -> None:
        """Run rounds one after another; return once all have ended and all copies are enqueued.
        Rounds of a communicator that is aborted are left out from then on."""
        enqueued: deque[tuple[Round, torch.Tensor, Callable[[], bool]]] = deque()
        for each in rounds:
            if not self._free:
                self._end(*enqueued.popleft())
            if each.communicator.error is None:
                buffers = self._free.popleft()
                self._enqueue(each, buffers)
                enqueued.append((each, buffers, self._streams.transfers_ended()))
        while enqueued:
            self._end(*enqueued.popleft())

    def _enqueue(self, each: Round, buffers: torch.Tensor) -> None:
        sent = received = None
        if each.sent is not None:
            peer, block, start, end = each.sent
            with self._streams.copying():
                block.pack(start, end, buffers[0, : end - start])
            sent = peer, Memory(buffers[0].data_ptr(), end - start)
        if each.received is not None:
            peer, _, start, end = each.received
            received = peer, Memory(buffers[1].data_ptr(), end - start)
        each.communicator.exchange(sent, received, self._streams.transfers_follow())

    def _end(self, each: Round, buffers: torch.Tensor, has_ended: Callable[[], bool]) -> None:
        if each.communicator.wait(has_ended) and each.received is not None:
            _, block, start, end = each.received
            with self._streams.copying():
                block.unpack(start, end, buffers[1, : end - start])
        self._free.append(buffers)
