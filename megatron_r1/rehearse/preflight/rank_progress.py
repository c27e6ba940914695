"""Each rank's progress in a common store, which names the rank that the others wait for.

A rank publishes the number and name of every step that it enters; a thread of its own, with a
connection of its own, publishes that the process is alive. Where a step takes too long, the lowest
rank that still runs compares all ranks and ends the preflight with the names of those that are
behind."""

import os
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError, Store

POLL_SECONDS = 0.5
STAGGER_SECONDS = 1.0
"""The lowest rank that runs writes the diagnosis: each waits so much longer than the one below."""
LIMIT_RANKS = 16
"""Ranks from this one on wait equally long, so that with thousands of ranks no process outlives the
limit by thousands of seconds."""
FAILURE_KEY = "failed"
"""The key of the store by which the rank that writes the diagnosis ends the others."""


def _end_process(message: str) -> None:
    """Print `message` and end the process, whose main thread may hang."""
    if message:
        print(f"megatron-r1: preflight: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class RankProgress:
    """Publishes the steps of this rank, and ends the process where a step takes too long.

    Attributes:
        seconds: how long each step took, by name."""

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        host: str,
        world_size: int,
        limit_seconds: float,
        end: Callable[[str], None] = _end_process,
    ):
        """Prepare to report and to watch the ranks' progress."""
        self.store = connect()
        self.seconds: dict[str, float] = {}
        self._connect = connect
        self._rank = rank
        self._host = host
        self._world_size = world_size
        self._limit, self._end = limit_seconds, end
        self._number = 0
        self._name = ""
        self._started_at = time.monotonic()
        self._factor = 1.0
        self._end_event, self._beats = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch_ranks, name="progress", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def begin_step(self, name: str, times_limit: float = 1.0) -> None:
        """Begin a step; every rank enters the same steps."""
        self._record_step_seconds()
        self._number, self._name, self._factor = self._number + 1, name, times_limit
        self._started_at = time.monotonic()
        self.store.set(f"step/{self._rank}", f"{self._number}\t{self._host}\t{name}")

    def barrier(self, name: str) -> None:
        """Wait until every rank has called `barrier` with this name. Each name is used once."""
        if self.store.add(f"met/{name}", 1) == self._world_size:
            self.store.set(f"go/{name}", "")
        self.store.wait([f"go/{name}"])

    def close(self) -> None:
        """End the watch."""
        self._record_step_seconds()
        self._end_event.set()
        self._thread.join()

    def diagnose(self, store: Store) -> str:
        """Return which ranks keep the others waiting: those that have stopped, or else those whose
        step is behind."""
        ranks = range(self._world_size)
        before = {rank: _stored_text(store, f"alive/{rank}") for rank in ranks}
        for _ in range(4):
            time.sleep(POLL_SECONDS)
            self._send_heartbeat(store)
        silent = [rank for rank in ranks if _stored_text(store, f"alive/{rank}") == before[rank]]
        steps = {rank: _stored_text(store, f"step/{rank}") for rank in ranks}
        numbers = {rank: int(step.split("\t")[0]) if step else 0 for rank, step in steps.items()}
        last = max(numbers, key=lambda rank: numbers[rank])
        slowest_ranks = [rank for rank in ranks if numbers[rank] == min(numbers.values())]
        waiting = steps[last].split("\t")[2] or "start"
        culprits = silent or slowest_ranks
        if len(culprits) == self._world_size:
            return f"all ranks hang in {waiting!r}: look at the network between the nodes"
        listing = "; ".join(
            _describe_rank(rank, steps[rank], rank in silent) for rank in culprits[:8]
        )
        remainder = f"; {len(culprits) - 8} more" if len(culprits) > 8 else ""
        remedy = f"The others wait in {waiting!r}. Replace that host, or look at it"
        return f"{listing}{remainder}. {remedy}"

    def _record_step_seconds(self) -> None:
        if self._name:
            self.seconds[self._name] = round(time.monotonic() - self._started_at, 3)

    def _send_heartbeat(self, store: Store) -> None:
        self._beats += 1
        store.set(f"alive/{self._rank}", str(self._beats))

    def _watch_ranks(self) -> None:
        try:
            store = self._connect()
            while not self._end_event.wait(POLL_SECONDS):
                self._send_heartbeat(store)
                if store.check([FAILURE_KEY]):
                    return self._end("")
                late_seconds = self._limit * self._factor + STAGGER_SECONDS * min(
                    self._rank, LIMIT_RANKS
                )
                if time.monotonic() - self._started_at > late_seconds:
                    message = self.diagnose(store)
                    return self._end(message if store.add(FAILURE_KEY, 1) == 1 else "")
        except DistError:
            if not self._end_event.is_set():
                self._end(f"rank {self._rank} ({self._host}) has lost the store of rank 0's node")


def _stored_text(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _describe_rank(rank: int, step: str, is_silent: bool) -> str:
    if not step:
        return f"rank {rank} has not started"
    _, host, name = step.split("\t")
    state = "has stopped" if is_silent else "is still"
    return f"rank {rank} on {host} {state} in {name!r}"
