"""What the controller does at a rendezvous: it reports an engine that is gone."""

import datetime

from torch.distributed import TCPStore

from megatron_r1.weight_sync.rendezvous.base import Rendezvous
from megatron_r1.weight_sync.rendezvous.failure import Failure

REPORT_SECONDS = 10.0


def report_failure(host: str, port: int, name: str, error: str) -> None:
    """Publish that an engine of the set `name` is gone, so that no rank waits for it.

    host, port: of the trainer's store. Raises torch.distributed.DistError where the trainer is gone
    as well."""
    timeout = datetime.timedelta(seconds=REPORT_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=timeout)
    Rendezvous(store, name, REPORT_SECONDS).report(Failure(error))
