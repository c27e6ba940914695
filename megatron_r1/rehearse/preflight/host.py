"""A node as its ranks find it: versions, memory, clock, ports, sandbox, and the run folder:
writable, the same for every node, fast, and with locks that hold."""

import contextlib
import hashlib
import os
import platform as system
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import psutil
import torch
from r1_grading.sandbox import require_sandbox

import megatron_r1
from megatron_r1.base.errors import UserError
from megatron_r1.base.files import fsync
from megatron_r1.config import Config
from megatron_r1.evaluation.identity import versions as package_versions
from megatron_r1.models import platform
from megatron_r1.rehearse.preflight.facts import FolderFacts, MemoryUsage, RankPlacement
from megatron_r1.rehearse.preflight.rank_progress import RankProgress
from megatron_r1.reporting.run_folder import LOCK, FolderLock, is_locked

GPU_PACKAGES = ("transformer-engine", "flash-attn", "triton", "deep-ep", "apex")
DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
CLOCK_PROBES = 8
"""Round trips to rank 0's clock. The fastest counts: the error is at most half of its time."""
CONNECT_SECONDS = 10.0
LOOKUPS = 32
"""Names that are looked up at once, about as many as a process has links of a push."""


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes: packages, this program's source, CUDA, NCCL, driver,
    GPU; and the kernel, which may differ."""
    version_by_name = package_versions()
    for package in GPU_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version_by_name[package] = metadata.version(package)
    version_by_name["source of megatron_r1"] = _digest(Path(megatron_r1.__file__).parent)
    version_by_name["kernel"] = system.release()
    if platform.has_gpu():
        version_by_name["CUDA"] = str(torch.version.cuda)
        version_by_name["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        version_by_name["GPU"] = torch.cuda.get_device_name()
        if DRIVER_VERSION_FILE.exists():
            version_by_name["driver"] = (
                DRIVER_VERSION_FILE.read_text().splitlines()[0].split("  ")[1].strip()
            )
    return version_by_name


def _digest(package: Path) -> str:
    """Return a digest of all source files: a version number stays the same between commits."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def host_memory() -> MemoryUsage:
    """Return this host's memory, with its three largest processes of others than this job."""
    memory = psutil.virtual_memory()
    session = os.getsid(0)
    other_processes = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) != session and process.info["memory_info"]:
                other_processes.append((process.info["memory_info"].rss, process.info))
    other_processes.sort(key=lambda process_memory: process_memory[0], reverse=True)
    holders = [
        f"{info['name']} ({info['pid']}): {rss / 2**30:.1f} GiB"
        for rss, info in other_processes[:3]
    ]
    return MemoryUsage(memory.total, memory.available, holders)


def device_memory(gpu: int) -> MemoryUsage | None:
    """Return the memory of a GPU with the processes that hold some; None without a GPU."""
    if not platform.has_gpu():
        return None
    free, total = torch.cuda.mem_get_info(gpu)
    return MemoryUsage(total, free, _gpu_holders(gpu))


def _gpu_holders(gpu: int) -> list[str]:
    uuid = f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-compute-apps=pid,used_memory"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        process = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        lines = process.stdout.strip().splitlines() if process.returncode == 0 else []
        return [line for line in lines if line.split(",")[0] != str(os.getpid())]
    return []


def unavailable_ports(config: Config, placement: RankPlacement) -> dict[str, str]:
    """Return why ports that the recipe fixes cannot be bound, by setting; on the controller's
    node, elsewhere {}."""
    settings = {
        "run.health_port": config.run.health_port,
        "rollout.hosts_port": config.rollout.hosts_port,
    }
    faults = {}
    for key, port in settings.items() if placement.node == 0 else ():
        if port:
            try:
                socket.create_server(("", port)).close()
            except OSError as error:
                faults[key] = f"port {port}: {os.strerror(error.errno or 0)}"
    return faults


def sandbox_problem() -> str:
    """Return why programs cannot be graded on this node, or ""."""
    try:
        require_sandbox("python")
    except UserError as error:
        return str(error)
    return ""


class ClockServer:
    """Rank 0's clock at a free port, as the controller's own: other nodes connect to it, which also
    shows that they can. A thread answers each byte with the time."""

    def __init__(self, backlog: int) -> None:
        self._socket = socket.create_server(("", 0), backlog=backlog)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="clock", daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(CONNECT_SECONDS)
                    while connection.recv(1):
                        connection.sendall(struct.pack("!d", time.time()))

    def close(self) -> None:
        """Stop serving."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()


def clock_offset(address: str, port: int) -> tuple[float, str]:
    """Return how many seconds this clock is ahead of the one at `address`, by the fastest of a few
    round trips, and "" or why it cannot be reached."""
    probes = []
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            for _ in range(CLOCK_PROBES):
                sent = time.time()
                connection.sendall(b"?")
                (remote_time,) = struct.unpack("!d", connection.recv(8, socket.MSG_WAITALL))
                arrival = time.time()
                probes.append((arrival - sent, (sent + arrival) / 2 - remote_time))
    except (OSError, struct.error) as error:
        return 0.0, f"{address}:{port}: {error}"
    return min(probes)[1], ""


def lookup_seconds(address: str) -> float:
    """Return how long the slowest of `LOOKUPS` takes to find the host's name of an address.

    torch looks it up for every connection to a store, with an IPv4 address as it is written in
    IPv6, and waits for it (`c10d::detail::formatSockAddr`)."""
    addresses = socket.getaddrinfo(address, None, socket.AF_INET6, flags=socket.AI_V4MAPPED)
    mapped = str(addresses[0][4][0])

    def look_up(_: int) -> float:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            socket.getnameinfo((mapped, 0), 0)
        return time.monotonic() - start

    with ThreadPoolExecutor(LOOKUPS) as threads:
        return max(threads.map(look_up, range(LOOKUPS)))


NUM_BYTES = 64 << 20
"""Size of the file that each node writes, and whose copy of the next node it reads."""
SMALL_FILES = 8
"""Files of 4 KiB whose fsync is timed; their median counts."""
APPEAR_SECONDS = 10.0
"""The time limit for a file to appear on another node: network file systems keep old listings for
seconds."""
SCRATCH_PREFIX = ".preflight"


def check_folder(folder: Path, placement: RankPlacement, progress: RankProgress) -> FolderFacts:
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
    with _faults(folder_facts):
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
    with _faults(folder_facts):
        if placement.is_node_leader or tries_lock:
            folder_facts.shared = _has_token(work, progress)
        if folder_facts.shared:
            folder_facts.excluded = is_locked(work) if tries_lock else None
            if placement.is_node_leader:
                _measure_writing(work / str(placement.node), folder_facts)
                folder_facts.free = shutil.disk_usage(work).free
    progress.barrier("folder written")
    neighbor_file = work / str((placement.node + 1) % placement.num_nodes)
    with _faults(folder_facts):
        if placement.is_node_leader and folder_facts.shared and neighbor_file.exists():
            folder_facts.read = _reading_rate(neighbor_file)
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
def _faults(folder_facts: FolderFacts) -> Iterator[None]:
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
    folder_facts.write = NUM_BYTES / (time.perf_counter() - start)
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
