"""Engine hosts without engines: real host processes, the controller's pool, and their messages.

Engines on them are in tests/system/test_engine_hosts.py.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from refusals import refused
from waiting import wait_until

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.authentication import (
    TOKEN_VARIABLE,
    known_token,
    make_token,
    protect_server,
)
from megatron_r1.base.processes.children import free_port
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.controller_address import publish_address, published_address
from megatron_r1.engines.fleet.host import HostLink
from megatron_r1.engines.fleet.host_messages import HostReport
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.fleet.placement import open_host_pool
from megatron_r1.engines.fleet.remote_server import RemoteServer
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.gpu import gpus_of_slot, visible_gpus


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    messages = []
    pool = HostPool(
        "tcp://127.0.0.1:*", make_token(tmp_path), silence_seconds=1e5, notify=messages.append
    )
    pool.messages, pool.folder = messages, tmp_path
    publish_address(tmp_path, f"tcp://127.0.0.1:{pool.port}")
    yield pool
    pool.close()


@pytest.fixture
def start_host(pool):
    """Starts hosts of engines; ends those that are left."""
    hosts = []

    def start(*options, **environment):
        command = [sys.executable, "-m", "megatron_r1.engines.fleet.host", *map(str, options)]
        pipe = subprocess.PIPE
        started = subprocess.Popen(
            command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True
        )
        hosts.append(started)
        return started

    yield start
    for started in hosts:
        started.kill()
        started.communicate()


def test_a_host_joins_and_leaves_on_a_signal(pool, start_host):
    host = start_host("--folder", pool.folder, "--engines", "3")
    wait_until(lambda: pool.num_free == 3)
    host.send_signal(signal.SIGTERM)
    assert host.wait() == 128 + signal.SIGTERM
    wait_until(lambda: pool.num_free == 0)


def test_the_end_of_the_run_ends_a_host_well(pool, start_host):
    host = start_host("--folder", pool.folder)
    wait_until(lambda: pool.num_free == 1)
    pool.close()
    assert host.wait() == 0


def test_a_host_that_waits_finds_the_run(tmp_path, start_host, pool):
    late = tmp_path / "late"
    host = start_host("--folder", late)
    assert str(late) in host.stdout.readline()
    make_token(late)
    with_token = known_token(late / "token")
    second = HostPool("tcp://127.0.0.1:*", with_token)
    try:
        publish_address(late, f"tcp://127.0.0.1:{second.port}")
        wait_until(lambda: second.num_free == 1)
    finally:
        second.close()


def test_an_engine_that_cannot_start_reports_why(pool, start_host):
    server = RemoteServer(pool, pool.folder / "nothing", pool.folder / "engine-0.log")
    server.start()  # before any host has come: it waits
    assert server.is_alive()
    start_host("--folder", pool.folder)
    with pytest.raises(EngineError, match="nothing"):
        asyncio.run(server.wait_ready(1e5))
    assert not server.is_alive()
    server.stop()
    wait_until(lambda: pool.num_free == 1)


def test_without_room_the_error_names_the_hosts(pool):
    server = RemoteServer(pool, pool.folder, pool.folder / "engine-0.log")
    server.start()
    with pytest.raises(EngineError, match=pool.describe()):
        asyncio.run(server.wait_ready(0.3))


def test_hosts_find_the_port_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    port = free_port("127.0.0.1")
    rollout = RolloutConfig(placement="hosts", hosts_address="127.0.0.1", hosts_port=port)

    async def scenario():
        async with open_host_pool(rollout, tmp_path, False, print) as pool:
            assert published_address(tmp_path) == f"tcp://127.0.0.1:{pool.port}"
            with refused("rollout.hosts_port", Cause.BUSY, f":{port}"):
                await open_host_pool(rollout, tmp_path, False, print).__aenter__()
            return pool.port

    assert asyncio.run(scenario()) == port
    assert published_address(tmp_path) is None


def test_a_report_of_another_version_is_refused_and_the_pool_goes_on(pool, start_host):
    link = HostLink(f"tcp://127.0.0.1:{pool.port}", known_token(pool.folder / "token"))
    try:
        wait_until(lambda: link._socket.poll(100, zmq.POLLOUT))
        link._socket.send(msgspec.msgpack.encode({"name": 7}))
        orders = []
        wait_until(lambda: (order := link.receive(0.1)) and not orders.append(order))
    finally:
        link.close()
    assert orders[0].refusal
    wait_until(lambda: pool.messages == [orders[0].refusal])
    start_host("--folder", pool.folder)
    wait_until(lambda: pool.num_free == 1)


def test_waiting_for_hosts_is_mentioned(pool, monkeypatch, tmp_path):
    """A run that does nothing else meanwhile would look as if it hung."""
    monkeypatch.setattr("megatron_r1.engines.fleet.host_pool.WAIT_SECONDS", 0.2)
    RemoteServer(pool, tmp_path, tmp_path / "engine.log").start()
    wait_until(lambda: any(pool.describe() in message for message in pool.messages))


def test_hosts_that_never_fall_silent_leave_the_pool_time_for_its_work():
    """As hundreds do that speak once a second each."""
    report = msgspec.msgpack.encode(HostReport("talkative", 1, ""))

    class Endless:
        num_heard = 0

        def poll(self, milliseconds):
            return True

        def recv_multipart(self):
            self.num_heard += 1
            assert self.num_heard < 300_000, "it does nothing but listen"
            return b"one of them", report

    pool = SimpleNamespace(_socket=Endless(), _lock=nullcontext(), _update_host=lambda *_: None)
    HostPool._receive_reports(pool)
    assert pool._socket.num_heard


@pytest.mark.more
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_vanishes_loses_its_engines_for_good(pool, start_host, how):
    host = start_host("--folder", pool.folder)
    wait_until(lambda: pool.num_free == 1)
    server = RemoteServer(pool, pool.folder / "nothing", pool.folder / "engine-0.log")
    host.send_signal(how)
    server.start()  # given to a host that can no longer start it
    if how == signal.SIGSTOP:
        pool.silence_seconds = 0.5
    wait_until(lambda: not server.is_alive())
    assert server.is_lost
    assert server.describe_end() in pool.messages[-1]
    if how == signal.SIGSTOP:  # awake again, it is a new host, and the old engine stays dead
        pool.silence_seconds = 1e5
        host.send_signal(signal.SIGCONT)
        wait_until(lambda: pool.num_free == 1)
        assert not server.is_alive()


def test_another_token_is_refused_and_the_host_prints_so(pool, start_host):
    address = f"tcp://127.0.0.1:{pool.port}"
    host = start_host("--controller", address, **{TOKEN_VARIABLE: "guessed"})
    assert any("token" in line for line in host.stdout)
    assert start_host("--controller", address, "--patience", "0").wait() == 1
    assert pool.num_free == 0 and not pool.messages


def test_memory_that_is_not_shared_is_refused(pool, start_host, monkeypatch):
    pool._memory = "another host's"
    host = start_host("--folder", pool.folder)
    _, error = host.communicate()
    assert host.returncode == 2
    assert "push.transport: gloo" in error and "push.transport: gloo" in pool.describe()


def test_a_refused_host_does_not_keep_engines_from_the_accepted_ones(pool):
    pool._memory = "shared"
    token = known_token(pool.folder / "token")
    links = [HostLink(f"tcp://127.0.0.1:{pool.port}", token) for _ in range(3)]

    def report(link, memory):
        link.send(HostReport(f"host-{memory}", 1, memory))
        return link.receive(0.1)

    def start(seconds=0.3):
        server = RemoteServer(pool, pool.folder, pool.folder / "engine-0.log")
        server.start()
        with pytest.raises(EngineError) as failure:
            asyncio.run(server.wait_ready(seconds))
        server.stop()
        return str(failure.value)

    refused, good, also_refused = links
    try:
        wait_until(lambda: (orders := report(refused, "other")) and orders.refusal)
        assert "host-other" in start()
        wait_until(lambda: report(good, "shared") and pool.num_free == 1)
        assert pool.describe() == "host-shared with 1"
        assert "host-shared" in start()
        wait_until(lambda: (orders := report(also_refused, "third")) and orders.refusal)
        assert pool.describe() == "host-shared with 1"
        assert "host-shared" in start()
        good.send(HostReport("host-shared", 1, "shared", is_leaving=True))
        wait_until(lambda: pool.num_free == 0)
        assert pool.describe() in start()
    finally:
        for link in links:
            link.close()


def test_a_host_that_cannot_read_its_orders_says_so():
    context = zmq.Context.instance()
    controller = context.socket(zmq.ROUTER)
    protect_server(controller, "t" * 64)
    port = controller.bind_to_random_port("tcp://127.0.0.1")
    link = HostLink(f"tcp://127.0.0.1:{port}", "t" * 64)
    try:
        wait_until(lambda: link._socket.poll(100, zmq.POLLOUT))
        link.send(HostReport("host", 1, ""))
        identity, _ = controller.recv_multipart()
        controller.send_multipart([identity, msgspec.msgpack.encode({"silence_seconds": "long"})])
        with refused("--controller", Cause.CHANGED, port):
            link.receive(10_000)
    finally:
        link.close()
        controller.close()


def test_gpus_are_shared_out_evenly():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == ["4", "5", "6", "7"]
    assert gpus_of_slot(["4", "5", "6", "7"], 2, 1, "--engines") == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(EngineError, match="4 .*4,5,6,7.*3 .*rollout.engines"):
        gpus_of_slot(["4", "5", "6", "7"], 3, 0, "rollout.engines")
