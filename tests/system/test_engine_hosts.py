"""A fleet whose engines run on engine hosts: agents come, vanish, come back, and it goes on."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from command_line import command_of, members
from tiny_models import QWEN, write_model
from waiting import until

from megatron_r1.base.processes.authentication import known_token
from megatron_r1.base.processes.fork_server import SERVERS
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.joining_hosts import accepting_hosts
from megatron_r1.engines.fleet.placement import open_host_pool, server_maker
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.settings import SERVER_MODULE

SMALL = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "num_threads": 1}


def agent(folder, *options):
    command = [sys.executable, "-m", "megatron_r1.engines.fleet.host", "--folder", folder, *options]
    # Its engines are to descend from it, not from the fork server that the tests share.
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", SERVERS: ""}
    return subprocess.Popen([*map(str, command)], env=os.environ | quiet)


def engine_processes(agent):
    """Return the process of the engine that an agent has started."""
    return [pid for pid in members(agent.pid) if f"-m {SERVER_MODULE} " in command_of(pid)][:1]


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen"
    write_model(folder, QWEN, seed=0)
    return folder


@pytest.mark.more
def test_hosts_join_vanish_and_bring_engines_again(model, tmp_path):
    agents, messages = [], []

    async def scenario():
        rollout = RolloutConfig(placement="hosts", hosts_address="127.0.0.1")
        async with open_host_pool(rollout, tmp_path, True, messages.append) as pool:
            agents.append(agent(tmp_path))
            fleet = EngineFleet(
                1,
                tmp_path,
                make_server=server_maker(pool),
                notify=messages.append,
                max_restarts=2,
                **SMALL,
            )
            async with fleet, accepting_hosts(fleet, pool):
                await fleet.start(model)
                first = await fleet.generate([1, 2, 3], n=1, max_tokens=8, temperature=0.0)
                (engine,) = fleet.engines
                assert engine.server.engine.host_names and engine.is_up
                # Another host during the run: its engine joins, on the same weights.
                agents.append(agent(tmp_path))
                await until(lambda: sum(e.accepts_groups for e in fleet.engines) == 2)
                # The first host dies with a request in flight: its engine dies with it, the
                # request is answered by the other, and none is restarted.
                (process,) = engine_processes(agents[0])
                asked = [
                    asyncio.create_task(fleet.generate([1, 2, 3], n=2, max_tokens=100))
                    for _ in range(4)
                ]
                await asyncio.sleep(0.2)
                agents[0].send_signal(signal.SIGKILL)
                groups = await asyncio.gather(*asked)
                assert [len(c.token_ids) for g in groups for c in g] == [100] * 8
                await until(lambda: gone(process))
                await until(lambda: len(fleet.engines) == 1)
                assert fleet.num_restarts == 0
                again = await fleet.generate([1, 2, 3], n=1, max_tokens=8, temperature=0.0)
                assert [c.token_ids for c in again] == [c.token_ids for c in first]
                # kill -9 of an engine: its host starts another, and reports its log.
                (process,) = engine_processes(agents[1])
                os.kill(process, signal.SIGKILL)
                await until(lambda: fleet.num_restarts == 1)
                await until(lambda: any(e.accepts_groups for e in fleet.engines))
                assert any("on host" in line and "SIGKILL" in line for line in messages)
        assert agents[1].wait() == 0  # the run is over

    try:
        asyncio.run(scenario())
    finally:
        for process in agents:
            process.kill()
    assert known_token(tmp_path / "token")


@pytest.mark.more
def test_no_host_is_an_error_and_no_hang(model, tmp_path):
    async def scenario():
        rollout = RolloutConfig(placement="hosts", hosts_address="127.0.0.1")
        async with open_host_pool(rollout, tmp_path, True, print) as pool:
            make = server_maker(pool)
            async with EngineFleet(
                1, tmp_path, make_server=make, start_timeout_seconds=0.5, **SMALL
            ) as fleet:
                with pytest.raises(EngineError, match="no host had room for it .no host has come"):
                    await fleet.start(model)

    asyncio.run(scenario())
