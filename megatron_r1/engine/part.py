"""An engine over several hosts: each runs a part of it, an equal share of its data-parallel copies.

This is vLLM's own way of doing it (`--headless`): the first part has the API server and the
coordinator, where the ranks of all parts meet. Tensor and pipeline ranks of a copy stay on one
host.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

import msgspec

SIOCGIFADDR = 0x8915  # linux/sockios.h


class Part(msgspec.Struct, frozen=True):
    """index: of `count` parts; coordinator: host:port where the first one's listens, which it
    chooses itself."""

    index: int
    count: int
    coordinator: str = ""

    @property
    def serves(self) -> bool:
        """Whether it has the API server."""
        return self.index == 0

    def copies(self, data: int) -> int:
        """How many of an engine's `data` copies it runs."""
        assert data % self.count == 0, f"{data} copies on {self.count} hosts"
        return data // self.count


def arguments(part: Part, data: int, coordinator: str) -> list[str]:
    """vLLM's, besides those of an engine of `data` copies on one host."""
    host, _, port = coordinator.rpartition(":")
    copies = part.copies(data)
    return [
        *("--data-parallel-size-local", str(copies)),
        *("--data-parallel-address", host, "--data-parallel-rpc-port", port),
        *([] if part.serves else ["--headless"]),
        *([] if part.serves else ["--data-parallel-start-rank", str(part.index * copies)]),
    ]


def environment(address: str) -> dict[str, str]:
    """What makes the ranks on the host with this address reachable for those on others. gloo would
    take the address that the host's name has, which on many is a loopback one. Raises OSError where
    it is a name that means nothing."""
    address = socket.gethostbyname(address)
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or interface_of(address)
    return {"VLLM_HOST_IP": address} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})


def interface_of(address: str) -> str | None:
    """The network interface whose (first) IPv4 address this is, if there is one (Linux)."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return None
