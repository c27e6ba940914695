"""Questions about a corpus of the user's, searched by the tools: SQLite's full-text index, BM25.

The corpus is JSONL of {title, text}. Its index is written once, next to it, as CORPUS.fts5. The
last answer is graded by the reward of the row's kind."""

import contextlib
import json
import os
import re
import sqlite3
import tempfile
from pathlib import Path

SNIPPET_WORDS = 32


class Retrieval:
    """Two tools, `search` and `read`. corpus: the path of the JSONL file. text_chars: the most
    characters of a document that `read` returns."""

    def __init__(self, corpus: str, text_chars: int = 4_000) -> None:
        self._index = sqlite3.connect(f"file:{index_of(Path(corpus))}?mode=ro", uri=True)
        self._text_chars = text_chars

    @classmethod
    def _before_episodes(cls, corpus: str, **_: object) -> None:
        """Write the index before the first episode, whose time limit a large corpus exceeds."""
        index_of(Path(corpus))

    def reset(self, **row: object) -> None:
        """Begin an episode; there is nothing to draw."""

    def close(self) -> None:
        self._index.close()

    def search(self, query: str, limit: int = 3) -> list[dict[str, object]]:
        """Search the corpus and return the number, title and a snippet of the best documents.

        Args:
            query: words to search for.
            limit: how many documents to return, 10 at most.
        """
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        if not words:
            return []
        rows = self._index.execute(
            "SELECT rowid, title, snippet(documents, 1, '', '', '…', ?) FROM documents "
            "WHERE documents MATCH ? ORDER BY rank LIMIT ?",
            (SNIPPET_WORDS, words, max(1, min(limit, 10))),
        )
        return [{"number": row[0], "title": row[1], "snippet": row[2]} for row in rows]

    def read(self, number: int) -> str:
        """Return a document.

        Args:
            number: of the document, as search returns it.
        """
        query = "SELECT title, text FROM documents WHERE rowid = ?"
        row = self._index.execute(query, (number,)).fetchone()
        if row is None:
            raise KeyError(f"there is no document {number}")
        return f"{row[0]}\n{row[1][: self._text_chars]}"


def index_of(corpus: Path) -> Path:
    """Return the index of a corpus, and write it where there is none, or an older one."""
    index = corpus.with_name(f"{corpus.name}.fts5")
    if index.exists() and index.stat().st_mtime >= corpus.stat().st_mtime:
        return index
    descriptor, name = tempfile.mkstemp(dir=corpus.parent, prefix=index.name)
    os.close(descriptor)
    try:
        _write_index(corpus, name)
        os.replace(name, index)  # others may be writing the same
    except BaseException:  # an environment's time limit is one, too
        os.unlink(name)
        raise
    return index


def _write_index(corpus: Path, name: str) -> None:
    with (
        open(corpus, encoding="utf-8") as lines,
        contextlib.closing(sqlite3.connect(name)) as database,
        database,
    ):
        database.execute("CREATE VIRTUAL TABLE documents USING fts5(title, text)")
        rows = map(json.loads, filter(str.strip, lines))
        database.executemany(
            "INSERT INTO documents VALUES (?, ?)",
            ((row.get("title", ""), row["text"]) for row in rows),
        )
