"""Results of expensive calls of a `sample` recipe, of judges and users' functions: each is computed
once and kept on disk under the version of what made it."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from megatron_r1.base.files.json_lines import append_lines, complete_lines

Key = tuple[Any, ...]
"""JSON values."""


class ResultCache:
    """JSON values by key in an append-only file; only their offsets are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        self._end = 0  # of the last whole line; appending cuts off a torn one
        if path.exists():
            with path.open("rb") as file:
                for offset, line in complete_lines(file):
                    self._offsets[json.loads(line)["key"]] = offset
                    self._end = offset + len(line)

    def __contains__(self, key: Key) -> bool:
        return _key_digest(key) in self._offsets

    def __getitem__(self, key: Key) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._offsets[_key_digest(key)])
            return json.loads(file.readline())["value"]

    def __setitem__(self, key: Key, value: Any) -> None:
        """Store a value, durable when this returns."""
        digest = _key_digest(key)
        append_lines(self.path, [{"key": digest, "value": value}])
        self._offsets[digest], self._end = self._end, self.path.stat().st_size

    async def get(self, key: Key, compute: Callable[[], Awaitable[Any]]) -> Any:
        """Return the value of `key`, computed and stored if it is missing."""
        if key not in self:
            self[key] = await compute()
        return self[key]


def _key_digest(key: Key) -> str:
    text = json.dumps(key, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
