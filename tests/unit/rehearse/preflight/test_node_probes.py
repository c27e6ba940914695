"""What a node finds out about itself."""

import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_r1.config import load_recipe, parse_recipe
from megatron_r1.rehearse.preflight import folder, node_probes, rank
from megatron_r1.rehearse.preflight.rank_placement import RankPlacement
from megatron_r1.rehearse.preflight.rank_progress import RankProgress
from megatron_r1.reporting.run_folder import RunFolder

ROOT = Path(__file__).parents[4]
ALONE = RankPlacement(rank=0, world_size=1, local_rank=0, local_world_size=1, host="here")


@pytest.fixture
def progress(monkeypatch):
    monkeypatch.setattr(folder, "NUM_BYTES", 1 << 20)
    store = dist.HashStore()
    return RankProgress(lambda: store, 0, "here", 1, 60.0)


def test_a_folder_is_measured_and_left_as_it_was(tmp_path, progress):
    with RunFolder(tmp_path / "run"):
        before = sorted((tmp_path / "run").rglob("*"))
        found = folder.measure_folder(tmp_path / "run", ALONE, progress)
        assert sorted((tmp_path / "run").rglob("*")) == before
    assert found.error == "" and found.shared and found.excluded is None
    assert min(found.write_rate, found.read_rate, found.fsync_seconds, found.free_bytes) > 0


def test_a_folder_that_cannot_be_written_is_an_error_with_its_cause(progress):
    found = folder.measure_folder(folder.Path("/proc/no/folder"), ALONE, progress)
    assert "No such file or directory: '/proc/no" in found.error and not found.shared


def test_a_port_of_the_recipe_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = parse_recipe({"run": {"health_port": port}, "rollout": {"hosts_port": 0}})
        fault = f"port {port}: Address already in use"
        assert node_probes.unavailable_ports(config, ALONE) == {"run.health_port": fault}


def test_the_clock_of_another_host_is_compared_over_a_connection(monkeypatch):
    server = node_probes.ClockServer(1)
    offset, unreachable = node_probes.clock_offset("127.0.0.1", server.port)
    assert unreachable == "" and abs(offset) < 1
    real = time.time
    server_thread_time = iter([real() - 100] * node_probes.CLOCK_PROBES)
    monkeypatch.setattr(node_probes.struct, "pack", _packing(server_thread_time))
    offset, _ = node_probes.clock_offset("127.0.0.1", server.port)
    assert 99 < offset < 130
    server.close()
    monkeypatch.undo()
    offset, unreachable = node_probes.clock_offset("127.0.0.1", server.port)
    assert unreachable.startswith(f"127.0.0.1:{server.port}: ")


def test_names_are_looked_up_at_once_and_as_torch_asks_for_them(monkeypatch):
    asked, all_ask = [], threading.Barrier(node_probes.LOOKUPS)

    def answer(address, flags):
        asked.append(address[0])
        all_ask.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(node_probes.socket, "getnameinfo", answer)
    assert node_probes.lookup_seconds("127.0.0.1") > 0
    assert asked == ["::ffff:127.0.0.1"] * node_probes.LOOKUPS
    assert node_probes.lookup_seconds("::1") > 0
    assert asked[node_probes.LOOKUPS :] == ["::1"] * node_probes.LOOKUPS


def _packing(times):
    pack = node_probes.struct.pack
    return lambda form, value: pack(form, next(times))


@pytest.mark.parametrize(
    ("changed", "is_used"),
    [
        ({}, False),
        ({"push.transport": "gloo"}, True),
        ({"rl.routing_replay": True}, True),
        ({"rollout.redundant_experts": 128}, True),
        ({"rollout.redundant_experts": 128, "rollout.colocated": True, "rl.staleness": 0}, False),
    ],
)
def test_the_host_network_is_measured_where_a_step_waits_for_it(changed, is_used):
    """Experts move over gloo behind a push, unless the engines sleep."""
    without = {"rl.routing_replay": False, "rollout.redundant_experts": 0}
    if "rollout.colocated" in changed:
        without |= {"rollout.placement": "local", "rollout.hosts_per_engine": 1}
    config = load_recipe(ROOT / "examples/deepseek_r1/r1_zero_pools.yaml", without | changed)
    assert rank._uses_host_network(config) == is_used
