"""A communicator of a push: it is created in the background, every wait for it has a limit, and it
is aborted by the thread that waits, so that nothing that its process does afterwards is held up."""

import ctypes
import time
from collections.abc import Callable

from torch.distributed import DistStoreError

from megatron_r1.weight_sync.rendezvous import Rendezvous, SetFailed
from megatron_r1.weight_sync.transports import nccl_library
from megatron_r1.weight_sync.transports.nccl_library import Memory, NcclError

FIRST_PAUSE, LONGEST_PAUSE = 2e-5, 1e-3
"""Seconds between two looks at what is waited for; the pauses grow."""
LOOK_SECONDS = 0.1
"""Seconds between two looks into the store whether the push has failed elsewhere."""
ABORT_SECONDS = 30.0
"""The time limit for calls to end that were aborted."""


class Communicator:
    """Rank `rank` of a communicator of `size` ranks, on the current GPU. First `begin`, then
    `wait_settled`, then `exchange`. One thread calls all of it.

    rendezvous: of its ranks. look: raises an error to abort with, by default the failure that one
    of them has reported. error: why it was aborted, or None."""

    def __init__(
        self, rendezvous: Rendezvous, rank: int, size: int, look: Callable[[], None] | None = None
    ):
        self.rendezvous, self.rank, self.size = rendezvous, rank, size
        self._look_elsewhere = look or rendezvous.raise_failure
        self.error: Exception | None = None
        self._handle: ctypes.c_void_p | None = None
        self._looked = self._aborted_at = 0.0
        self.set_limit(rendezvous.timeout_seconds)
        if rank == 0:
            rendezvous.publish_communicator(nccl_library.new_id())

    def set_limit(self, seconds: float) -> None:
        """Set the time limit of all waits from now on."""
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def begin(self) -> None:
        """Begin to create it, as soon as rank 0 has published its id."""
        found: list[bytes] = []

        def is_there() -> bool:
            found.extend(filter(None, [self.rendezvous.find_communicator()]))
            return bool(found) or self.error is not None

        if self.wait(is_there):
            try:
                self._handle = nccl_library.begin_communicator(found[0], self.rank, self.size)
            except NcclError as error:
                self.abort(error)

    def exchange(
        self, sent: tuple[int, Memory] | None, received: tuple[int, Memory] | None, stream: int
    ) -> bool:
        """Enqueue a send and a receive in one group; return False if it was aborted."""
        if self._handle is not None:
            try:
                nccl_library.exchange(self._handle, sent, received, stream)
            except NcclError as error:
                self.abort(error)
        return self.wait_settled()

    def wait_settled(self) -> bool:
        """Wait until all that was begun is there or enqueued; return False if it was aborted."""
        return self.wait(lambda: self._handle is None or nccl_library.is_settled(self._handle))

    def wait(self, is_done: Callable[[], bool]) -> bool:
        """Wait until something is done, and abort on an error of NCCL, on a failure elsewhere, and
        after the time limit. Return False if it was aborted, once it is done all the same.

        Raises RuntimeError where aborted calls do not end."""
        pause = FIRST_PAUSE
        while True:
            try:
                if is_done():
                    return self.error is None
                self._look()
            except (NcclError, SetFailed, TimeoutError, DistStoreError) as error:
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
            nccl_library.abort(handle)

    def _look(self) -> None:
        """Raise the error because of which what is waited for will not be done."""
        if self._handle is None:
            if self.error is not None:
                return
        else:
            nccl_library.is_settled(self._handle)
        now = time.monotonic()
        if now > self._looked + LOOK_SECONDS:
            self._looked = now
            self._look_elsewhere()
        if now > self._deadline:
            raise TimeoutError(f"the other ranks did not come within {self._seconds:g} s")
