"""The store of slot tables, which equal engines share."""

import msgspec
import xxhash
from torch.distributed import PrefixStore, Store

from megatron_r1.weight_sync.table import SlotTable


class TableStore:
    """Publishes slot tables under their digest, so equal engines share one. Each table is published
    once and read once: one table per engine took 15 s for 64 engines (docs/log.md)."""

    def __init__(self, store: Store):
        self._store = PrefixStore("tables", store)
        self._known: dict[str, SlotTable] = {}

    def publish(self, table: SlotTable) -> str:
        """Write the table, if it is new, and return its digest."""
        encoded = msgspec.msgpack.encode(table)
        digest = xxhash.xxh3_128_hexdigest(encoded)
        if not self._store.check([digest]):
            self._store.set(digest, encoded)  # type: ignore[arg-type]  # the stubs say str
        return digest

    def get(self, digest: str) -> SlotTable:
        """Return the table, the same object every time."""
        if digest not in self._known:
            encoded = self._store.get(digest)
            self._known[digest] = msgspec.msgpack.decode(encoded, type=SlotTable)
        return self._known[digest]
