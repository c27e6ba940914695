"""An engine over several hosts: each runs a part, an equal share of its data-parallel copies.

This is vLLM's own way of doing it (`--headless`): the first part has the API server and the
coordinator, where the ranks of all parts meet. Tensor and pipeline ranks of a copy stay on one
host."""

import os
import socket

import msgspec
import psutil


class EnginePart(msgspec.Struct, frozen=True):
    """One host's part of an engine that spans `count` hosts. coordinator: the first part's, as
    host:port, which it chooses when it starts."""

    index: int
    count: int
    coordinator: str = ""

    @property
    def serves(self) -> bool:
        """Whether the part has the API server."""
        return self.index == 0

    def copies(self, data: int) -> int:
        """Return how many of an engine's `data` copies the part runs."""
        assert data % self.count == 0, f"{data} copies on {self.count} hosts"
        return data // self.count

    def arguments(self, data: int, coordinator: str) -> list[str]:
        """Return vLLM's arguments besides those of an engine of `data` copies on one host."""
        host, _, port = coordinator.rpartition(":")
        copies = self.copies(data)
        return [
            *("--data-parallel-size-local", str(copies)),
            *("--data-parallel-address", host, "--data-parallel-rpc-port", port),
            *([] if self.serves else ["--headless"]),
            *([] if self.serves else ["--data-parallel-start-rank", str(self.index * copies)]),
        ]


def network_environment(address: str) -> dict[str, str]:
    """Return the environment that makes ranks on the host with this address reachable for others.

    gloo would use the address that the host's name resolves to, which on many is a loopback one.
    Raises OSError for a name that does not resolve."""
    address = socket.gethostbyname(address)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            interface = interface or name
    return {"VLLM_HOST_IP": address} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
