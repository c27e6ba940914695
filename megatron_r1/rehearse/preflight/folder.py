"""The run folder as ranks find it: writable, one for all nodes, fast, with locks that hold."""

import contextlib
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.base.errors import UserError
from megatron_r1.base.files import fsync
from megatron_r1.rehearse.preflight.facts import FolderFacts
from megatron_r1.rehearse.preflight.rank_placement import RankPlacement
from megatron_r1.rehearse.preflight.rank_progress import RankProgress
from megatron_r1.reporting.folder_lock import LOCK, FolderLock, is_locked

NUM_BYTES = 64 << 20
"""Size of the file that each node writes, and whose copy of the next node it reads."""
SMALL_FILES = 8
"""Files of 4 KiB whose fsync is timed; their median counts."""
APPEAR_SECONDS = 10.0
"""The time limit for a file to appear on another node: network file systems keep old listings for
seconds."""
SCRATCH_PREFIX = ".preflight"


def measure_folder(folder: Path, placement: RankPlacement, progress: RankProgress) -> FolderFacts:
    """Return what this node finds in `folder`, and leave the folder as it was before. Every rank
    calls this; the first rank of each node writes, and the second rank of a single node tries the
    lock.

    Node 0 makes a folder within `folder` and holds the lock of that folder. Each node writes a
    file, then reads the file of the next node, which is not in its own cache.

    Args:
        folder: the run's folder.
        placement: this rank and its node.
        progress: the steps of all ranks."""
    work, folder_facts = folder / SCRATCH_PREFIX, FolderFacts()
    existed, lock = folder.exists(), None
    with _note_errors(folder_facts):
        if placement.rank == 0:
            work.mkdir(parents=True, exist_ok=True)
            token = secrets.token_hex(8)
            (work / "token").write_text(token)
            fsync(work)
            progress.store.set("token", token)
            lock = FolderLock(work / LOCK)
    progress.barrier("folder made")
    tries_lock = (
        placement.rank == 1
        if placement.num_nodes == 1
        else placement.is_node_leader and placement.node > 0
    )
    with _note_errors(folder_facts):
        if placement.is_node_leader or tries_lock:
            folder_facts.shared = _has_token(work, progress)
        if folder_facts.shared:
            folder_facts.excluded = is_locked(work) if tries_lock else None
            if placement.is_node_leader:
                _measure_writing(work / str(placement.node), folder_facts)
                folder_facts.free_bytes = shutil.disk_usage(work).free
    progress.barrier("folder written")
    neighbor_file = work / str((placement.node + 1) % placement.num_nodes)
    with _note_errors(folder_facts):
        if placement.is_node_leader and folder_facts.shared and neighbor_file.exists():
            folder_facts.read_rate = _reading_rate(neighbor_file)
    progress.barrier("folder read")
    if placement.rank == 0:
        if lock is not None:
            lock.release()
        shutil.rmtree(work, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return folder_facts


@contextlib.contextmanager
def _note_errors(folder_facts: FolderFacts) -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        folder_facts.error = folder_facts.error or str(error)


def _has_token(work: Path, progress: RankProgress) -> bool:
    """Return whether the file that node 0 has written appears here within `APPEAR_SECONDS`."""
    if not progress.store.check(["token"]):
        return False  # node 0 could not write it
    token, end = progress.store.get("token").decode(), time.monotonic() + APPEAR_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if (work / "token").read_text() == token:
                return True
        time.sleep(0.2)
    return False


def _measure_writing(path: Path, folder_facts: FolderFacts) -> None:
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(NUM_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    folder_facts.write_rate = NUM_BYTES / (time.perf_counter() - start)
    seconds = []
    for number in range(SMALL_FILES):
        start = time.perf_counter()
        with open(f"{path}-{number}", "wb") as file:
            file.write(block[:4096])
            file.flush()
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - start)
    folder_facts.fsync_seconds = statistics.median(seconds)


def _reading_rate(path: Path) -> float:
    with open(path, "rb", buffering=0) as file:
        # A single node reads its own file: not from memory, where the file system allows that.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(1 << 20):
            pass
        return NUM_BYTES / (time.perf_counter() - start)
