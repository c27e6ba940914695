"""Runs the rounds of a push that one process takes part in (`plan.rounds`) over NCCL, on two
streams.

All groups of NCCL calls are on one stream, one after another; buckets are packed and unpacked on
the other. That one never waits for a peer: what a round has received is unpacked once the host has
seen that the round has ended. Meanwhile the next round is enqueued already. So a peer that does
not come holds up nothing but the stream of the transfers, until its communicator is aborted.

A communicator is created in the background, every wait for it has a limit, and it is aborted by
the thread that waits, so that nothing that its process does afterwards is held up. NCCL is called
through ctypes, with communicators whose calls do not block the host. torch's process groups are
not used here: their watchdog ends the process where a call fails or takes long, and a process has
to outlive its pushes. The variables TORCH_NCCL_* have no effect on a push."""

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed import DistStoreError

from megatron_r1.base.transports import ROUNDS_AHEAD
from megatron_r1.push.rendezvous import Rendezvous, SetFailedError
from megatron_r1.push.transports.payloads import Payload

SUCCESS, IN_PROGRESS = 0, 7
BYTE = 1
CONFIG_MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 21400
"""Of `ncclConfig_t`: of its fields NCCL reads those that this version had."""


class NCCLError(RuntimeError):
    """A call of NCCL failed, or a rank of its communicator is gone."""


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`, by which the ranks of a communicator meet."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


class NCCLConfig(ctypes.Structure):
    """The first fields of `ncclConfig_t`."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


class DeviceMemory(NamedTuple):
    """Bytes of device memory.

    Attributes:
        address: the address of the first byte.
        num_bytes: the size from there on."""

    address: int
    num_bytes: int


@cache
def _nccl_library() -> ctypes.CDLL:
    """Return NCCL: the library that torch has loaded."""
    loaded_library = ctypes.CDLL(None)
    return (
        loaded_library if hasattr(loaded_library, "ncclGetVersion") else ctypes.CDLL("libnccl.so.2")
    )


def _new_communicator_id() -> bytes:
    """Return the id of a new communicator, 128 bytes."""
    identifier = UniqueId()
    _check_result("ncclGetUniqueId", _nccl_library().ncclGetUniqueId(ctypes.byref(identifier)))
    return bytes(identifier)


def _create_communicator(identifier: bytes, rank: int, num_ranks: int) -> ctypes.c_void_p:
    """Begin to create this rank's communicator on the current GPU; it is there once
    `_is_communicator_ready`.

    Args:
        identifier: of the communicator, 128 bytes (`_new_communicator_id`).
        rank: this rank in it.
        num_ranks: the number of its ranks."""
    handle = ctypes.c_void_p()
    config = NCCLConfig(ctypes.sizeof(NCCLConfig), CONFIG_MAGIC, CONFIG_VERSION, 0)
    unique_id = UniqueId.from_buffer_copy(identifier)
    code = _nccl_library().ncclCommInitRankConfig(
        ctypes.byref(handle),
        ctypes.c_int(num_ranks),
        unique_id,
        ctypes.c_int(rank),
        ctypes.byref(config),
    )
    _check_result("ncclCommInitRankConfig", code)
    return handle


def _is_communicator_ready(handle: ctypes.c_void_p) -> bool:
    """Return whether no call of the communicator is being prepared.

    Raises:
        NCCLError: the communicator has an error.
    """
    error = ctypes.c_int()
    _check_result(
        "ncclCommGetAsyncError", _nccl_library().ncclCommGetAsyncError(handle, ctypes.byref(error))
    )
    _check_result("NCCL", error.value)
    return error.value == SUCCESS


def enqueue_send_recv(
    handle: ctypes.c_void_p,
    sent: tuple[int, DeviceMemory] | None,
    received: tuple[int, DeviceMemory] | None,
    stream: int,
) -> None:
    """Enqueue a send and a receive in one group; they run when the stream reaches them.

    Args:
        handle: the communicator.
        sent: the receiving rank and the bytes to send; None: nothing is sent.
        received: the sending rank and the memory for its bytes; None: nothing is received.
        stream: the CUDA stream's handle."""
    nccl, target = _nccl_library(), ctypes.c_void_p(stream)
    _check_result("ncclGroupStart", nccl.ncclGroupStart())
    for name, call in (("ncclSend", sent), ("ncclRecv", received)):
        if call is not None:
            peer, memory = call
            address, size = ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.num_bytes)
            peer_rank = ctypes.c_int(peer)
            _check_result(name, getattr(nccl, name)(address, size, BYTE, peer_rank, handle, target))
    _check_result("ncclGroupEnd", nccl.ncclGroupEnd())


def _abort_communicator(handle: ctypes.c_void_p) -> None:
    """End the communicator and all of its calls."""
    _nccl_library().ncclCommAbort(handle)


def _check_result(name: str, code: int) -> None:
    """Raise NCCLError for a code of NCCL that is an error of the function `name`."""
    if code not in (SUCCESS, IN_PROGRESS):
        describe = _nccl_library().ncclGetErrorString
        describe.restype = ctypes.c_char_p
        raise NCCLError(f"{name}: {describe(ctypes.c_int(code)).decode()} ({code})")


FIRST_PAUSE, LONGEST_PAUSE = 2e-5, 1e-3
"""Seconds between two checks of what is waited for; the pauses grow."""
CHECK_SECONDS = 0.1
"""Seconds between two checks of the store, whether the push has failed on another rank."""
ABORT_SECONDS = 30.0
"""The time limit for calls to end that were aborted."""


class Communicator:
    """Rank `rank` of a communicator of `num_ranks` ranks, on the current GPU. First `create`, then
    `wait_ready`, then `send_recv`. One thread calls all of it.

    Args:
        rendezvous: where its ranks publish the communicator's id, and failures.
        rank: the rank of this process in it.
        num_ranks: the number of its ranks.
        check: raises an error to abort with, by default the failure that a rank has reported.

    Attributes:
        rendezvous: the rendezvous of its ranks.
        error: why it was aborted, or None."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        rank: int,
        num_ranks: int,
        check: Callable[[], None] | None = None,
    ):
        self.rendezvous, self.rank, self.num_ranks = rendezvous, rank, num_ranks
        self._check_others = check or rendezvous.raise_failure
        self.error: Exception | None = None
        self._handle: ctypes.c_void_p | None = None
        self._checked_at = self._aborted_at = 0.0
        self.set_timeout(rendezvous.timeout_seconds)
        if rank == 0:
            rendezvous.publish_communicator(_new_communicator_id())

    def set_timeout(self, seconds: float) -> None:
        """Set the time limit of all waits from now on."""
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def create(self) -> None:
        """Begin to create it, as soon as rank 0 has published its id."""
        communicator_ids: list[bytes] = []

        def is_published() -> bool:
            communicator_ids.extend(filter(None, [self.rendezvous.find_communicator()]))
            return bool(communicator_ids) or self.error is not None

        if self.wait(is_published):
            try:
                self._handle = _create_communicator(communicator_ids[0], self.rank, self.num_ranks)
            except NCCLError as error:
                self.abort(error)

    def send_recv(
        self,
        sent: tuple[int, DeviceMemory] | None,
        received: tuple[int, DeviceMemory] | None,
        stream: int,
    ) -> bool:
        """Enqueue a send and a receive in one group; return False if it was aborted.

        Args:
            sent: the receiving rank and the bytes to send; None: nothing is sent.
            received: the sending rank and the memory for its bytes; None: nothing is received.
            stream: the CUDA stream's handle."""
        if self._handle is not None:
            try:
                enqueue_send_recv(self._handle, sent, received, stream)
            except NCCLError as error:
                self.abort(error)
        return self.wait_ready()

    def wait_ready(self) -> bool:
        """Wait until all that was begun is there or enqueued; return False if it was aborted."""
        return self.wait(lambda: self._handle is None or _is_communicator_ready(self._handle))

    def wait(self, is_done: Callable[[], bool]) -> bool:
        """Wait until something is done, and abort on an error of NCCL, on a failure of another
        rank, and after the time limit. Return False if it was aborted, once it has ended.

        Raises:
            RuntimeError: aborted calls do not end.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                if is_done():
                    return self.error is None
                self._check_transfers()
            except (NCCLError, SetFailedError, TimeoutError, DistStoreError) as error:
                self.abort(error)
            if self.error is not None and time.monotonic() > self._aborted_at + ABORT_SECONDS:
                raise RuntimeError("calls of NCCL do not end although they were aborted")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def abort(self, error: Exception) -> None:
        """End all calls of this rank; the first error is kept."""
        if self.error is None:
            self.error, self._aborted_at = error, time.monotonic()
        handle, self._handle = self._handle, None
        if handle is not None:
            _abort_communicator(handle)

    def _check_transfers(self) -> None:
        """Raise the error that makes the awaited transfers impossible."""
        if self._handle is None:
            if self.error is not None:
                return
        else:
            _is_communicator_ready(self._handle)
        now = time.monotonic()
        if now > self._checked_at + CHECK_SECONDS:
            self._checked_at = now
            self._check_others()
        if now > self._deadline:
            raise TimeoutError(f"the other ranks did not come within {self._seconds:g} s")


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
