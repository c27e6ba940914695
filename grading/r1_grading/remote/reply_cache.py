"""The disk cache of a judge's replies."""

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from r1_grading.base.errors import Cause, UserError
from r1_grading.base.files import atomic_write


class ReplyCache:
    """One JSON file per reply, named by the hash of the request and of the vote's number.

    Several processes may share a folder: a file appears whole, by a rename, and processes that
    write the same name write replies to the same request. Files are never evicted: each is 2-10 KB,
    and the folder may be deleted at any time, or by age with `find FOLDER -mtime +30 -delete`.
    The model's name is part of the request and the address is not, so that a served model may move;
    use a folder per model where two have the same name. An invalid file counts as absent."""

    def __init__(self, folder: str | Path) -> None:
        """Open the cache.

        Raises:
            UserError: the folder cannot be created or written to.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache: {folder} cannot be made ({error.strerror}); choose another",
                key="cache",
                cause=Cause.UNREADABLE,
            ) from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(
                f"cache: {folder} cannot be written to; choose another",
                key="cache",
                cause=Cause.UNREADABLE,
            )

    async def get(self, request: dict[str, Any], vote: int) -> str | None:
        """Return the stored reply to a request's vote, or None."""
        return await asyncio.to_thread(self._read_reply, self._entry_path(request, vote))

    async def put(self, request: dict[str, Any], vote: int, reply: str) -> None:
        """Store the reply to a request's vote.

        Args:
            request: the body of the request.
            vote: the number of the vote.
            reply: the judge's reply."""
        entry = {"request": request, "vote": vote, "answer": reply}
        # Not durable: a reply lost in a power cut is requested again.
        path, content = self._entry_path(request, vote), json.dumps(entry)
        await asyncio.to_thread(atomic_write, path, content, durable=False)

    def _entry_path(self, request: dict[str, Any], vote: int) -> Path:
        name = hashlib.sha256(json.dumps([request, vote], sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _read_reply(self, path: Path) -> str | None:
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reply if isinstance(reply, str) else None
