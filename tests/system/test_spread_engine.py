"""One engine over two hosts: what its ranks compute, what a push brings them, and what happens when
one of the hosts is killed. See also tests/unit/engines/fleet/test_multi_host.py."""

import asyncio
import os
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import msgspec
import pytest
from file_trainer import FilePusher
from sampled import TOLERANCE, largest_difference, sample, stamped
from tiny_models import DEEPSEEK, QWEN, write_model

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.placement import open_host_pool, server_maker

ENGINE = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 2}
ADDRESSES = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
START = 400
"""Seconds: two processes import vLLM at once, where others may be at work as well."""


def agent(folder, address):
    command = [sys.executable, "-m", "megatron_r1.engines.fleet.host"]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [*command, "--folder", folder, "--address", address], env=os.environ | quiet
    )


class Hosts:
    """A fleet of one engine over two hosts of this machine, each with an address of its own."""

    def __init__(self, folder):
        self.folder, self.messages, self.agents = folder, [], {}

    def come(self, address):
        self.agents[address] = agent(self.folder, address)

    async def run(self, scenario, model, layout, **settings):
        """`scenario(fleet)` with the engine started on `model`; then the agents' exit statuses."""
        rollout = RolloutConfig(
            placement="hosts", hosts_address="127.0.0.1", hosts_per_engine=2, data_parallel=2
        )
        async with open_host_pool(rollout, self.folder, False, self.messages.append) as pool:
            fleet = EngineFleet(
                1,
                self.folder,
                make_server=server_maker(pool),
                notify=self.messages.append,
                max_restarts=1,
                start_timeout_seconds=START,
                weight_transfer_backend="megatron_r1_gloo",
                **ENGINE,
                **layout,
                **settings,
            )
            async with fleet:
                await fleet.start(model)
                await scenario(fleet)
        return sorted(agent.wait(30) for agent in self.agents.values())


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    for address in ADDRESSES[:2]:
        hosts.come(address)
    yield hosts
    for agent in hosts.agents.values():
        agent.kill()
        agent.wait()


@pytest.mark.slow
def test_experts_on_two_hosts_get_their_weights_and_a_killed_host_is_reopen_pool(
    hosts, oracle, tmp_path
):
    """Each host has half of the experts of every layer, so that every token passes through both."""
    before, trained = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate((before, trained)):
        oracle(write_model, folder, DEEPSEEK, seed)
    layout = {"data_parallel": 2, "expert_parallel": True}

    async def scenario(fleet):
        server = fleet.engines[0].server
        assert len({part.host for part in server.engine.parts}) == 2
        assert largest_difference(oracle, before, await sample(fleet)) < TOLERANCE
        await FilePusher(DEEPSEEK, fleet, layout=layout, transport="gloo").push(trained)
        groups = await sample(fleet)
        assert stamped(groups) == {1}
        assert largest_difference(oracle, trained, groups) < TOLERANCE
        # The host without the server is killed amid answers. The one that is left, and one that
        # comes, give them on an engine with the weights that the trainer has.
        asked = asyncio.create_task(sample(fleet, max_tokens=180))
        await asyncio.sleep(0.5)
        serving = urlsplit(server.url).hostname
        [headless] = [address for address in hosts.agents if address != serving]
        hosts.agents[headless].send_signal(signal.SIGKILL)
        hosts.come(ADDRESSES[2])
        groups = await asked
        assert fleet.num_restarts == 1 and not server.is_alive()
        assert any("engine-0 died: host" in line for line in hosts.messages)
        assert "has closed its line" in server.describe_end()
        assert stamped(groups) == {1}
        assert largest_difference(oracle, trained, groups) < TOLERANCE

    statuses = asyncio.run(hosts.run(scenario, before, layout))
    assert statuses == [-signal.SIGKILL, 0, 0]  # the others were ordered to leave
    logs = {log.name for log in tmp_path.glob("engine-*.log")}
    assert logs == {"engine-0.log", "engine-0-part-1.log"}


@pytest.mark.slow
def test_every_call_reaches_copies_that_share_nothing_and_one_that_hangs_is_noticed(
    hosts, oracle, tmp_path
):
    before, trained = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate((before, trained)):
        oracle(write_model, folder, QWEN, seed)

    async def scenario(fleet):
        old = await checksums(fleet)
        await FilePusher(QWEN, fleet, layout={"data_parallel": 2}, transport="gloo").push(trained)
        new = await checksums(fleet)
        assert new["dp0"] == new["dp1"] != old["dp0"] == old["dp1"]
        serving = urlsplit(fleet.engines[0].server.url).hostname
        [headless] = [address for address in hosts.agents if address != serving]
        for process in children(hosts.agents[headless]):
            os.killpg(process, signal.SIGSTOP)
        groups = await sample(fleet)
        assert fleet.num_restarts == 1
        assert any("has not answered for 10 seconds" in line for line in hosts.messages)
        assert largest_difference(oracle, trained, groups) < TOLERANCE

    run = hosts.run(scenario, before, {"data_parallel": 2}, unresponsive_seconds=10)
    assert asyncio.run(run) == [0, 0]


async def checksums(fleet):
    """rank → tensor → checksum of what it computes with, by vLLM's own count."""
    answer = await fleet.engines[0].client.request(
        "POST", "/weight_checker", {"action": "checksum"}
    )
    ranks = {}
    for place, checksum in msgspec.json.decode(answer)["checksums"].items():
        rank, _, tensor = place.partition(":")
        ranks.setdefault(rank, {})[tensor] = checksum
    return ranks


def children(agent):
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    return [int(process) for process in found.stdout.split()]
