"""What a trainer rank does at a rendezvous."""

import time
from collections.abc import Sequence

import msgspec
from torch.distributed import DistStoreError, Store

from megatron_r1.weight_sync.rendezvous.base import ANSWER_SECONDS, Rendezvous
from megatron_r1.weight_sync.rendezvous.failure import Failure
from megatron_r1.weight_sync.rendezvous.offers import (
    PositionPlan,
    PublishedReceiver,
    ReceiverInfo,
)

KEY_POLL_SECONDS = 0.01
"""The pause between checks of trainer rank 0 whether all engines are there."""


class TrainerRendezvous(Rendezvous):
    """The rendezvous of a trainer rank with one engine."""

    def read_receivers(self, num_ranks: int) -> list[ReceiverInfo]:
        """Return table and address of all ranks of the engine; called on trainer rank 0. Raises
        ValueError where a rank has published a problem."""
        offers = [f"offer/{rank}" for rank in range(num_ranks)]
        self._wait_for_keys(self.store, offers, self.timeout_seconds)
        receivers = []
        for rank, offer in enumerate(offers):
            published = msgspec.msgpack.decode(self.store.get(offer), type=PublishedReceiver)
            if published.problem:
                raise ValueError(f"engine rank {rank}: {published.problem}")
            table = self._tables.get(published.digest)
            receivers.append(ReceiverInfo(table, published.address))
        return receivers

    def publish_plan(self, position: int, plan: PositionPlan) -> None:
        """Publish the plan of a position."""
        self.shared.set(f"plan/{position}", msgspec.msgpack.encode(plan))  # type: ignore[arg-type]

    def publish_prepared(self, num_senders: int, num_ranks: int) -> None:
        """Publish that this rank, one of `num_senders`, has published its plans and can be reached.

        num_ranks: of all engines of the set."""
        if self.shared.add("prepared", 1) == num_senders:  # the last ends the wait of all
            self.shared.set("ready", str(num_ranks))

    def await_complete(self, push: int) -> None:
        """Wait until all engine ranks have all of a push; called on trainer rank 0."""
        # An engine rank that does not get all of it has the time to report why.
        seconds = self.push_seconds + 2 * ANSWER_SECONDS
        self._wait_for_keys(self.shared, [f"complete/{push}"], seconds)

    def report_error(self, error: str, *members: int) -> Failure:
        """Report an error with these members at fault, as `report` does. Where the store is lost,
        return the failure of that error."""
        failure = Failure(error, list(members))
        try:
            return self.report(failure)
        except RuntimeError:
            return failure

    def _wait_for_keys(self, store: Store, keys: Sequence[str], seconds: float) -> None:
        """Wait until the store has all keys. Its own `wait` would log a warning every time that it
        ends to check for a failure."""
        deadline = time.monotonic() + seconds
        while not store.check(list(keys)):
            self._raise_failure()
            if time.monotonic() > deadline:
                raise DistStoreError(f"{self.engine}: {keys[-1]} is not there after {seconds:g} s")
            time.sleep(KEY_POLL_SECONDS)
