"""Replies of a judge on disk, shared by any number of processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_r1.errors import UserError
from megatron_r1.files import atomic_write


class ReplyCache:
    """One JSON file per reply, named by the hash of the request and of the vote's number.

    Several processes may share a folder: a file appears whole, by a rename, and processes that
    write the same name write replies to the same request. Files are never evicted: each is 2-10 KB,
    and the folder may be deleted at any time, or by age with `find FOLDER -mtime +30 -delete`.
    The model's name is part of the request and the address is not, so that a served model may move;
    use a folder per model where two have the same name. An invalid file counts as absent.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError when the folder cannot be created or written to."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache: {folder} cannot be made ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"cache: {folder} cannot be written to")

    async def get(self, request: dict[str, Any], vote: int) -> str | None:
        return await asyncio.to_thread(self._read, self._path(request, vote))

    async def put(self, request: dict[str, Any], vote: int, reply: str) -> None:
        entry = {"request": request, "vote": vote, "answer": reply}
        # Not durable: a reply lost in a power cut is requested again.
        path, content = self._path(request, vote), json.dumps(entry)
        await asyncio.to_thread(atomic_write, path, content, durable=False)

    def _path(self, request: dict[str, Any], vote: int) -> Path:
        name = hashlib.sha256(json.dumps([request, vote], sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _read(self, path: Path) -> str | None:
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reply if isinstance(reply, str) else None
