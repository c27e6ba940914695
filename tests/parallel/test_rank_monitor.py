"""The monitors of stuck ranks answer over real sockets."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE
from megatron_r1.base.processes.children import free_port
from megatron_r1.controller.trainer_calls.rank_socket import RankSocket

HERE = Path(__file__).parent
TOKEN = "secret" * 8


def start_ranks(address: str) -> list[subprocess.Popen]:
    port = str(free_port("127.0.0.1"))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {RANKS_TOKEN_VARIABLE: TOKEN, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, HERE / "stuck_rank.py", address],
            env=os.environ | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


async def inspect(controller: RankSocket, processes: list[subprocess.Popen]):
    statuses = {}
    while len(statuses) < 2 or any(at.operation != "update" for at in statuses.values()):
        statuses = await controller.statuses(range(3), within_seconds=1)
    assert set(statuses) == {0, 1}, "the third never came"
    processes[1].send_signal(signal.SIGSTOP)
    while statuses.keys() != {0} or statuses[0].threads[0].collective is None:
        statuses = await controller.statuses(range(2), within_seconds=1)
    return statuses[0]


@pytest.mark.more
def test_a_rank_stuck_in_a_collective_names_it_and_ends_without_a_controller():
    async def run():
        controller = RankSocket("tcp://127.0.0.1:*", TOKEN)
        processes = start_ranks(controller.address)
        try:
            stuck = await inspect(controller, processes)
            controller.close()
            _, errors = await asyncio.to_thread(processes[0].communicate)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return stuck, processes[0].returncode, errors

    stuck, status, errors = asyncio.run(run())
    main = stuck.threads[0]
    assert main.name == "MainThread" and stuck.operation == "update"
    assert main.collective.startswith("all_reduce among ranks 0, 1, asked for by add_up (stuck_")
    assert any("in add_up: dist.all_reduce(values)" in frame for frame in main.frames)
    assert "distributed_c10d.py" in main.frames[-1], "the innermost comes last"
    assert status == 1 and "the controller is gone; in all_reduce among ranks 0, 1" in errors
