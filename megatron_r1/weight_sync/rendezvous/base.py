"""What every side of a rendezvous does: it waits, reports a failure, and learns of one."""

import datetime

from torch.distributed import PrefixStore, Store

from megatron_r1.weight_sync.rendezvous.failure import (
    Failure,
    SetFailed,
    decode_failure,
    encode_failure,
)
from megatron_r1.weight_sync.rendezvous.tables import TableStore

ANSWER_SECONDS = 5.0
"""The time limit for the ranks of a position to show, after a failure, that they are alive."""


class Rendezvous:
    """The meeting of engine number `member` of the set `name`, of `num_members` engines, with the
    trainer and with the other engines.

    Every call waits for the other side at most `timeout_seconds`, during a push `push_seconds`
    (default the same), and then raises torch.distributed.DistStoreError; it raises SetFailed as
    soon as the set is reported as failed. tables: shared by a process that meets many sets."""

    def __init__(
        self,
        store: Store,
        name: str,
        timeout_seconds: float,
        push_seconds: float | None = None,
        tables: TableStore | None = None,
        *,
        member: int = 0,
        num_members: int = 1,
    ):
        self.engine, self.timeout_seconds = f"{name}.{member}", timeout_seconds
        self.push_seconds = timeout_seconds if push_seconds is None else push_seconds
        self.member, self.num_members = member, num_members
        self.store, self.shared = PrefixStore(self.engine, store), PrefixStore(name, store)
        self.store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
        self._tables = tables or TableStore(store)

    def new_connection(self) -> Store:
        """Return a new connection to the store, for a thread of its own: while one thread waits,
        all others that use its connection have to wait."""
        return self.shared.clone()  # type: ignore[attr-defined]  # missing in the stubs

    def await_prepared(self) -> int:
        """Wait until all trainer ranks are prepared; return the number of engine ranks."""
        num_ranks = int(self.shared.get("ready"))
        if not num_ranks:
            raise SetFailed(decode_failure(self.shared.get("failed")))
        return num_ranks

    def report(self, failure: Failure) -> Failure:
        """Publish a failure, unless one has been published already, and return the first one."""
        # Sets the key only where there is none: a missing key compares as equal to "".
        first = self.shared.compare_set("failed", "", encode_failure(failure))
        self.shared.set("ready", "0")  # ends the wait of all that are still connecting
        return decode_failure(first)

    def _raise_failure(self) -> None:
        """Raise SetFailed if a failure of the set has been published."""
        if self.shared.check(["failed"]):
            raise SetFailed(decode_failure(self.shared.get("failed"))) from None
