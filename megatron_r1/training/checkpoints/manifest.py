"""What every file of a checkpoint must be: its size and its checksum.

    manifest.json   {"format": 1, "files": {".metadata": {"bytes": 5120, "blake3": "9f…"}, …},
                     "digest": "…"}         of "files" itself, so that a flipped byte here shows too
BLAKE3 because it is the fastest that also cannot collide by accident (4.5 GB/s on one core where
CRC-32 does 2.0 and BLAKE2b 0.7), and because `b3sum` checks it without us.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from blake3 import blake3

from megatron_r1.files import atomic_write

NAME = "manifest.json"
FORMAT = 1
Verify = Literal["full", "size", "none"]
CHUNK_BYTES = 8 * 1024**2
THREADS = 2  # per process: hashing leaves the interpreter lock, and a disk likes two readers


class Entry(NamedTuple):
    """A file as it was written."""

    num_bytes: int
    checksum: str


class BadManifest(Exception):
    """The manifest is missing or is not what was written; the text says which."""


def write(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write the manifest of every file in `folder`, atomically; the last thing put into it.

    known: entries of files whose bytes were hashed on their way to the disk; the rest is read.
    """
    known = known or {}
    rest = [name for name in _files(folder) if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        read = dict(zip(rest, pool.map(lambda name: checksum(folder / name), rest), strict=True))
    files = {
        name: {"bytes": entry.num_bytes, "blake3": entry.checksum}
        for name, entry in sorted({**known, **read}.items())
    }
    content = {"format": FORMAT, "files": files, "digest": _digest(files)}
    atomic_write(folder / NAME, json.dumps(content, indent=1))


def read(folder: Path) -> dict[str, Entry]:
    """Every file that belongs into `folder`. Raises BadManifest."""
    try:
        content = json.loads((folder / NAME).read_bytes())
        files = content["files"]
        entries = {name: Entry(int(f["bytes"]), str(f["blake3"])) for name, f in files.items()}
    except FileNotFoundError:
        raise BadManifest(f"{NAME} is missing") from None
    except OSError as error:
        raise BadManifest(f"{NAME} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadManifest(f"{NAME} is not readable as a manifest") from None
    if content.get("format") != FORMAT:
        raise BadManifest(f"{NAME} has format {content.get('format')!r}, this reads {FORMAT}")
    if content.get("digest") != _digest(files):
        raise BadManifest(f"{NAME} has been changed since it was written")
    return entries


def damage(folder: Path, verify: Verify = "full", only: Collection[str] | None = None) -> list[str]:
    """What is wrong with `folder`, a line per file; nothing where it is as it was written.

    verify: "full" reads and hashes every byte, "size" asks the file system, "none" trusts.
    only: the files to look at; others are somebody else's to check.
    """
    if verify == "none":
        return []
    try:
        entries = read(folder)
    except BadManifest as error:
        return [str(error)]
    names = [name for name in entries if only is None or name in only]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _fault(folder / name, entries[name], verify), names)
        return [f"{name} {fault}" for name, fault in zip(names, found, strict=True) if fault]


def share(entries: Mapping[str, Entry], index: int, count: int) -> list[str]:
    """The files that worker `index` of `count` looks at: about the same bytes for each."""
    heap = [(0, worker) for worker in range(count)]
    mine = []
    for name, entry in sorted(entries.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        load, worker = heapq.heappop(heap)
        if worker == index:
            mine.append(name)
        heapq.heappush(heap, (load + entry.num_bytes, worker))
    return mine


def checksum(path: Path) -> Entry:
    """Of a file on disk, read in pieces."""
    hasher, num_bytes = blake3(), 0
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            hasher.update(piece)
            num_bytes += len(piece)
    return Entry(num_bytes, hasher.hexdigest())


def _fault(path: Path, entry: Entry, verify: Verify) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.num_bytes:
            return f"has {size:,} bytes where {entry.num_bytes:,} were written"
        if verify == "full" and checksum(path).checksum != entry.checksum:
            return "does not have the checksum it was written with"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME:
            yield name


def _digest(files: Mapping) -> str:
    return blake3(json.dumps(files, sort_keys=True).encode()).hexdigest()
