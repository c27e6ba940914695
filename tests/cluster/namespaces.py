"""Hosts of a small network, each a network namespace of this machine (needs root).

They have addresses, routes and cables of their own, and share everything else: file system,
processes, /dev/shm.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


def obstacle() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root"
    name = f"mr1try{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces do not work here: {error}; on Debian: apt-get install iproute2"
    return None


class Host:
    """One namespace, with `address` on the network."""

    def __init__(self, name: str, address: str, cable: str) -> None:
        self.name, self.address, self._cable = name, address, cable

    def start(self, command: Sequence[object], log: Path, env: dict[str, str]) -> subprocess.Popen:
        """Run `command` on this host, its output in `log`; in a process group of its own."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def pull_cable(self) -> None:
        ip("link", "set", self._cable, "down")

    def plug_in(self) -> None:
        ip("link", "set", self._cable, "up")

    def take_cable_away(self) -> None:
        """At once; a namespace goes only when its last process has."""
        ip("link", "delete", self._cable)

    def kill_all(self) -> None:
        """End what still runs here."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for process in found.stdout.split():
            subprocess.run(["kill", "-9", process], capture_output=True)


class Network:
    """A bridge and the hosts on it; a context that leaves nothing behind."""

    def __init__(self) -> None:
        self._tag, self._subnet = os.getpid() % 100_000, os.getpid() % 250
        self.bridge = f"mr1br{self._tag}"
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill_all()
            host.take_cable_away()
            ip("netns", "delete", host.name)
        ip("link", "delete", self.bridge)

    def host(self) -> Host:
        """One more, connected."""
        number = len(self.hosts) + 1
        name, cable = f"mr1h{number}p{self._tag}", f"mr1c{number}p{self._tag}"
        address = f"10.213.{self._subnet}.{number}"
        ip("netns", "add", name)
        self.hosts.append(Host(name, address, cable))
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", cable, "master", self.bridge, "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
        return self.hosts[-1]
