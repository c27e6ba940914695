"""A node as its ranks find it: versions, memory, sandbox, and its connection to rank 0's: ports,
clock and names of hosts."""

import contextlib
import hashlib
import os
import platform as system
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import psutil
import torch
from r1_grading.sandbox import require_sandbox

import megatron_r1
from megatron_r1.base.errors import UserError
from megatron_r1.config import Config
from megatron_r1.evaluation.package_versions import package_versions
from megatron_r1.models import platform
from megatron_r1.models.loaded_libraries import driver_version
from megatron_r1.rehearse.preflight.facts import MemoryUsage
from megatron_r1.rehearse.preflight.rank_placement import RankPlacement

GPU_PACKAGES = ("transformer-engine", "flash-attn", "triton", "deep-ep", "apex")
CLOCK_PROBES = 8
"""Round trips to rank 0's clock. The fastest counts: the error is at most half of its time."""
CONNECT_SECONDS = 10.0
LOOKUPS = 32
"""Names that are looked up at once, about as many as a process has links of a push."""


def node_versions() -> dict[str, str]:
    """Return what must be equal on all nodes: packages, this program's source, driver, GPU; and the
    kernel, which may differ."""
    version_by_name = package_versions()
    for package in GPU_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version_by_name[package] = metadata.version(package)
    version_by_name["source of megatron_r1"] = _source_digest(Path(megatron_r1.__file__).parent)
    version_by_name["kernel"] = system.release()
    if platform.has_gpu():
        version_by_name["GPU"] = torch.cuda.get_device_name()
        with contextlib.suppress(OSError):  # containers may lack the management library
            version_by_name["driver"] = driver_version()
    return version_by_name


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


def sandbox_problem() -> str:
    """Return why programs cannot be graded on this node, or ""."""
    try:
        require_sandbox("python")
    except UserError as error:
        return str(error)
    return ""


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


class ClockServer:
    """Rank 0's clock at a free port, as the controller's own: other nodes connect to it, which also
    shows that they can. A thread answers each byte with the time."""

    def __init__(self, backlog: int) -> None:
        self._socket = socket.create_server(("", 0), backlog=backlog)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve_clock, name="clock", daemon=True).start()

    def _serve_clock(self) -> None:
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


def _source_digest(package: Path) -> str:
    """Return a digest of all source files: a version number stays the same between commits."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


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
