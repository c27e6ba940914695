"""Answers of a judge on disk, shared by any number of processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


class ReplyCache:
    """One JSON file per answer, named by the hash of the request and of the vote's number.

    Several processes may share a folder: a file appears by a rename, whole, and two that write the
    same name write answers to the same request. Nothing is ever evicted: a file is 2-10 KB, the
    folder may be deleted at any time, and by age with `find FOLDER -mtime +30 -delete`.
    The model's name is part of the request and the address is not, so that a served model may move;
    use a folder per model when two go by one name. A file that cannot be read as what was written
    counts as absent.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError when the folder cannot be made or written to."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache: {folder} cannot be made ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"cache: {folder} cannot be written to")

    async def get(self, request: dict[str, Any], vote: int) -> str | None:
        return await asyncio.to_thread(self._read, self._path(request, vote))

    async def put(self, request: dict[str, Any], vote: int, answer: str) -> None:
        entry = {"request": request, "vote": vote, "answer": answer}
        await asyncio.to_thread(_write, self._path(request, vote), json.dumps(entry))

    def _path(self, request: dict[str, Any], vote: int) -> Path:
        name = hashlib.sha256(json.dumps([request, vote], sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _read(self, path: Path) -> str | None:
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None


def _write(path: Path, content: str) -> None:
    # No fsync, unlike files.atomic_write: what a power cut takes is asked for again.
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
