"""Results that are dear - a judge's votes, a rewritten answer - on disk, so that none is asked for
twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_r1.files.jsonl import append_lines

Key = tuple[Any, ...]


class Memo:
    """JSON values by key in one append-only file; only where they stand is in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        self._end = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # torn by a kill; appending cuts it off
                    self._places[json.loads(line)["key"]] = self._end
                    self._end += len(line)

    def __contains__(self, key: Key) -> bool:
        return _digest(key) in self._places

    def __getitem__(self, key: Key) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._places[_digest(key)])
            return json.loads(file.readline())["value"]

    def __setitem__(self, key: Key, value: Any) -> None:
        """Durable when this returns."""
        digest = _digest(key)
        append_lines(self.path, [{"key": digest, "value": value}])
        self._places[digest], self._end = self._end, self.path.stat().st_size


def _digest(key: Key) -> str:
    text = json.dumps(key, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
