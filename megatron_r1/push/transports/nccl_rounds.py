"""Runs the rounds of a push that one process takes part in (`matching.rounds`) over NCCL, on two
streams.

All groups of NCCL calls are on one stream, one after another; buckets are packed and unpacked on
the other. That one never waits for a peer: what a round has received is unpacked once the host has
seen that the round has ended. Meanwhile the next round is enqueued already. So a peer that does
not come holds up nothing but the stream of the transfers, until its communicator is aborted
(`nccl_communicator`)."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from megatron_r1.base.transports import ROUNDS_AHEAD
from megatron_r1.push.transports.nccl_communicator import Communicator, DeviceMemory
from megatron_r1.push.transports.payloads import Payload


class PushStreams:
    """A GPU's streams for packing and for transfers; it becomes the thread's current GPU."""

    def __init__(self, device: int) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", device)
        # Of high priority: others take theirs from torch's pool of the ordinary ones.
        self._copies, self._transfers = (torch.cuda.Stream(device, priority=-1) for _ in range(2))

    def copy_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which copies are enqueued, on their stream."""
        return torch.cuda.stream(self._copies)

    def order_copies_after_current(self) -> None:
        """Let copies from now on wait for what the current stream has enqueued by now."""
        self._copies.wait_stream(torch.cuda.current_stream())

    def order_transfers_after_copies(self) -> int:
        """Let transfers from now on wait for the copies enqueued by now; return their stream."""
        self._transfers.wait_stream(self._copies)
        return self._transfers.cuda_stream

    def transfers_ended(self) -> Callable[[], bool]:
        """Return a function that says whether the transfers enqueued by now have ended."""
        return self._transfers.record_event().query

    def copies_ended(self) -> Callable[[], bool]:
        """Return a function that says whether the copies enqueued by now have ended."""
        return self._copies.record_event().query


class BucketTransfer(NamedTuple):
    """A send or a receive of one bucket of a payload.

    Attributes:
        peer: the other side's rank in the communicator.
        payload: what is packed from, or unpacked to.
        start: the first byte.
        end: the byte after the last."""

    peer: int
    payload: Payload
    start: int
    end: int


class PushRound(NamedTuple):
    """What a process sends and receives in one group.

    Attributes:
        communicator: the communicator of both transfers.
        sent: to another rank; None: nothing is sent.
        received: from another rank; None: nothing is received."""

    communicator: Communicator
    sent: BucketTransfer | None
    received: BucketTransfer | None


class RoundRunner:
    """Runs rounds, with buffers for each direction of `ROUNDS_AHEAD` of them.

    Args:
        streams: where copies and transfers are enqueued.
        rounds: all rounds that it will run."""

    def __init__(self, streams: PushStreams, rounds: Sequence[PushRound]):
        self._streams = streams
        transfers = [
            transfer
            for push_round in rounds
            for transfer in (push_round.sent, push_round.received)
            if transfer
        ]
        bucket_bytes = max((transfer.end - transfer.start for transfer in transfers), default=0)
        with streams.copy_stream():
            memory = torch.empty(
                (ROUNDS_AHEAD, 2, bucket_bytes), dtype=torch.uint8, device=streams.device
            )
        self._free = deque(memory.unbind())

    def run(self, rounds: Iterable[PushRound]) -> None:
        """Run rounds one after another; return once all have ended and all copies are enqueued.
        Rounds of a communicator that is aborted are left out from then on."""
        enqueued_rounds: deque[tuple[PushRound, torch.Tensor, Callable[[], bool]]] = deque()
        for push_round in rounds:
            if not self._free:
                self._complete_round(*enqueued_rounds.popleft())
            if push_round.communicator.error is None:
                buffers = self._free.popleft()
                self._enqueue_round(push_round, buffers)
                enqueued_rounds.append((push_round, buffers, self._streams.transfers_ended()))
        while enqueued_rounds:
            self._complete_round(*enqueued_rounds.popleft())

    def _enqueue_round(self, push_round: PushRound, buffers: torch.Tensor) -> None:
        sent_bucket = received_bucket = None
        if push_round.sent is not None:
            peer, payload, start, end = push_round.sent
            with self._streams.copy_stream():
                payload.pack(start, end, buffers[0, : end - start])
            sent_bucket = peer, DeviceMemory(buffers[0].data_ptr(), end - start)
        if push_round.received is not None:
            peer, _, start, end = push_round.received
            received_bucket = peer, DeviceMemory(buffers[1].data_ptr(), end - start)
        stream = self._streams.order_transfers_after_copies()
        push_round.communicator.send_recv(sent_bucket, received_bucket, stream)

    def _complete_round(
        self, push_round: PushRound, buffers: torch.Tensor, has_ended: Callable[[], bool]
    ) -> None:
        if push_round.communicator.wait(has_ended) and push_round.received is not None:
            _, payload, start, end = push_round.received
            with self._streams.copy_stream():
                payload.unpack(start, end, buffers[1, : end - start])
        self._free.append(buffers)
