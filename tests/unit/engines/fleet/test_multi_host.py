"""Engines over several hosts, as the controller's pool handles them: places for all parts or none,
their orders, and what ends an engine.

A real engine over two hosts is tests/system/test_spread_engine.py's.
"""

import asyncio
import time
from itertools import pairwise

import pytest
from fakes.engine_host import COORDINATOR, ScriptedHost
from refusals import refused

from megatron_r1 import config
from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.authentication import TOKEN_VARIABLE, make_token
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.fleet.remote_server import RemoteServer
from megatron_r1.engines.server.environment_variables import network_environment
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.settings import EnginePart


class World:
    """A pool for engines of two hosts, and scripted hosts."""

    def __init__(self, folder):
        self.folder, self.messages, self.hosts = folder, [], []
        self.token = make_token(folder)
        self.pool = HostPool(
            "tcp://127.0.0.1:*",
            self.token,
            hosts_per_engine=2,
            silence_seconds=1e5,
            notify=self.messages.append,
        )

    def host(self, name, num_engines=1):
        self.hosts.append(ScriptedHost(self.pool, self.token, name, num_engines))
        return self.hosts[-1]

    def engine(self, name):
        server = RemoteServer(
            self.pool, self.folder / "model", self.folder / f"{name}.log", data_parallel=4
        )
        server.start()
        return server

    def turn(self, seconds):
        """Let all hosts receive and report for so long."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    def until(self, condition):
        while not condition():
            for host in self.hosts:
                host.turn()

    def vanish(self, host):
        self.hosts.remove(host)
        host.close()

    def hosts_of(self, server):
        return {host.name for host in self.hosts if server.engine.name in host.orders}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    world = World(tmp_path)
    yield world
    for host in world.hosts:
        host.close()
    world.pool._hosts.clear()  # none is left that could answer
    world.pool.close()


def test_the_first_part_reports_where_the_other_connects(world):
    hosts = [world.host("a"), world.host("b")]
    server = world.engine("engine-0")
    parts = {}

    def collect_orders():
        for host in hosts:
            for order in host.orders.values():
                parts.setdefault(order.part.index, (host, order))
        return len(parts) == 2

    world.until(collect_orders)
    (first, order), (second, other) = parts[0], parts[1]
    assert first is not second
    assert order.part == EnginePart(0, 2) and other.part == EnginePart(1, 2, COORDINATOR)
    # Not one file for both, where they share the folder.
    assert (order.log, other.log) == (
        str(world.folder / "engine-0.log"),
        str(world.folder / "engine-0-part-1.log"),
    )
    world.until(lambda: server.engine.parts[1].report is not None)
    assert server.url == f"http://{first.name}:1"


def test_two_engines_never_hold_half_of_what_both_need(world):
    """Two places in all: the first engine gets both, and the other both of them afterwards."""
    first, second = world.engine("engine-0"), world.engine("engine-1")
    world.host("a")
    world.turn(0.5)
    assert world.hosts_of(first) == world.hosts_of(second) == set()
    world.host("b")
    world.until(lambda: world.hosts_of(first) == {"a", "b"})
    world.turn(0.3)
    assert world.hosts_of(second) == set() and second.is_alive()
    world.pool.remove(first.engine)
    world.until(lambda: world.hosts_of(second) == {"a", "b"})
    assert world.hosts_of(first) == set()


def test_a_host_alone_is_not_enough_and_the_error_says_so(world):
    world.host("a", num_engines=3)
    world.until(lambda: "host a" in " ".join(world.messages))
    assert world.pool.num_free == 0
    server = world.engine("engine-0")
    with pytest.raises(EngineError, match="a with 3"):
        asyncio.run(server.wait_ready(0.3))


def test_room_is_counted_in_engines_over_different_hosts(world):
    """Of 3, 1, 1 and 1 places: (3,1), (2,1), (1,1)."""
    for name, places in (("a", 3), ("b", 1), ("c", 1), ("d", 1)):
        world.host(name, places)
    world.until(lambda: world.pool.num_free == 3)
    servers = [world.engine(f"engine-{index}") for index in range(3)]
    world.until(lambda: all(len(world.hosts_of(server)) == 2 for server in servers))
    assert all("a" in world.hosts_of(server) for server in servers)
    assert world.pool.num_free == 0


def test_a_part_that_ends_ends_the_other_and_is_named(world):
    hosts = {name: world.host(name) for name in "ab"}
    server = world.engine("engine-0")
    world.until(lambda: world.hosts_of(server) == {"a", "b"})
    hosts["b"].ends[server.engine.name] = "exit code 7; its log"
    world.until(lambda: not server.is_alive())
    assert not server.is_lost
    assert server.describe_end().endswith("host b: exit code 7; its log")
    world.until(lambda: world.hosts_of(server) == set())  # without a call
    world.until(lambda: world.pool.num_free == 1)


@pytest.mark.more
@pytest.mark.parametrize("vanishing", [0, 1], ids=["serving", "headless"])
def test_a_host_that_vanishes_is_to_blame_also_where_another_part_ended_before(world, vanishing):
    """Ranks end soon after those they compute with; the pool takes longer to miss a host. It is not
    an engine that died on a good host, which would use up a restart."""
    hosts = {name: world.host(name) for name in "ab"}
    server = world.engine("engine-0")
    world.until(lambda: world.hosts_of(server) == {"a", "b"})
    gone, stays = (
        server.engine.parts[index].host.report.name for index in (vanishing, 1 - vanishing)
    )
    world.vanish(hosts[gone])
    hosts[stays].ends[server.engine.name] = "connection reset by peer"
    world.until(lambda: not server.is_alive())
    assert server.is_lost
    assert f"host {gone}" in server.describe_end()
    assert server.describe_end() in world.messages[-1]
    world.until(lambda: world.hosts_of(server) == set())
    # One that comes later makes a pair with the one that is left.
    following = world.engine("engine-0")
    world.host("c")
    world.until(lambda: world.hosts_of(following) == {stays, "c"})


def test_ranks_are_shared_out_in_order():
    part = EnginePart(2, 4)
    assert part.copies(16) == 4
    arguments = part.arguments(16, COORDINATOR)
    pairs = dict(pairwise(arguments))
    assert pairs["--data-parallel-start-rank"] == "8" and "--headless" in arguments
    assert pairs["--data-parallel-address"] == "10.0.0.1"
    assert pairs["--data-parallel-rpc-port"] == "4711"
    assert "--headless" not in EnginePart(0, 4).arguments(16, COORDINATOR)


def test_gloo_is_told_the_interface_that_others_reach(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert network_environment("127.0.0.1")["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in network_environment("192.0.2.1")  # of no interface
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert network_environment("127.0.0.1")["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize(
    ("rollout", "cause"),
    [
        ({"data_parallel": 4, "hosts_per_engine": 2}, Cause.CONFLICT),
        ({"data_parallel": 4, "hosts_per_engine": 3, "placement": "hosts"}, Cause.INDIVISIBLE),
    ],
)
def test_what_cannot_be_spread_is_refused(rollout, cause):
    with refused("rollout.hosts_per_engine", cause, rollout["hosts_per_engine"]):
        config.parse_recipe({"rollout": rollout})
