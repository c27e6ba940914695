"""A rank's communicator of NCCL, whose waits all end, and the calls of NCCL's library for it.

A communicator is created in the background, every wait for it has a limit, and it is aborted by
the thread that waits, so that nothing that its process does afterwards is held up. NCCL is called
through ctypes, with communicators whose calls do not block the host. torch's process groups are
not used here: their watchdog ends the process where a call fails or takes long, and a process has
to outlive its pushes. The variables TORCH_NCCL_* have no effect on a push."""

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch.distributed import DistStoreError

from megatron_r1.base.transports import PUSH_CHANNELS
from megatron_r1.push.rendezvous import EngineSetFailedError, Rendezvous

SUCCESS, IN_PROGRESS = 0, 7
BYTE = 1
CONFIG_MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 22907
"""Of `ncclConfig_t`: of its fields NCCL reads those that this version had."""
UNDEFINED = -(2**31)


class NCCLError(RuntimeError):
    """A call of NCCL failed, or a rank of its communicator is gone."""


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`, by which the ranks of a communicator meet."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


class NCCLConfig(ctypes.Structure):
    """`ncclConfig_t` of NCCL 2.29."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_uint) for name in ("magic", "version")),
        *((name, ctypes.c_int) for name in ("blocking", "cgaClusterSize", "minCTAs", "maxCTAs")),
        ("netName", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("splitShare", "trafficClass")),
        ("commName", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("collnetEnable", "CTAPolicy", "shrinkShare")),
        *((name, ctypes.c_int) for name in ("nvlsCTAs", "nChannelsPerNetPeer")),
        *((name, ctypes.c_int) for name in ("nvlinkCentricSched", "graphUsageMode", "numRmaCtx")),
    ]


def push_config() -> NCCLConfig:
    """Return the configuration of a push's communicators: calls do not block, few channels."""
    values = {field[0]: UNDEFINED for field in NCCLConfig._fields_ if field[1] is ctypes.c_int}
    values |= {"blocking": 0} | PUSH_CHANNELS
    return NCCLConfig(ctypes.sizeof(NCCLConfig), CONFIG_MAGIC, CONFIG_VERSION, **values)


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
    config = push_config()
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
            except (NCCLError, EngineSetFailedError, TimeoutError, DistStoreError) as error:
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
