"""Where a trainer's state is while engines use its memory: what a full or a faulty disk does."""

import os
from types import SimpleNamespace

import pytest
import torch
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.trainer import offload_stores
from megatron_r1.trainer.offload import Offload, make_offload
from megatron_r1.trainer.offload_stores import DiskStore, HostMemoryStore


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(offload_stores, "BUFFER_BYTES", 7)


def parts() -> list[torch.Tensor]:
    return [torch.arange(size, dtype=torch.uint8) + size for size in (5, 14, 1, 20)]


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_store_gives_back_what_it_keeps_also_a_second_time(tmp_path, kind):
    store = HostMemoryStore() if kind == "host" else DiskStore(str(tmp_path))
    for times in (1, 3):
        kept = [part * times for part in parts()]
        store.write(kept)
        back = [torch.zeros_like(part) for part in kept]
        store.read(back)
        assert all(map(torch.equal, back, kept))
    assert not list(tmp_path.iterdir()), "a killed run would leave this"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.pwrite(file, b"\xff", 9), "bytes 7 to 14"),
        (lambda file: os.ftruncate(file, 30), "ends before byte 28"),
    ],
)
def test_a_disk_that_gives_back_something_else_ends_the_trainer(tmp_path, damage, message):
    store = DiskStore(str(tmp_path))
    store.write(parts())
    damage(store._file.fileno())
    with pytest.raises(RuntimeError, match=message):
        store.read(parts())


class Network:
    """A trained network of one layer, whose optimizer has stepped."""

    def __init__(self):
        layer = torch.nn.Linear(8, 8)
        self.model_chunks = [layer]
        self.optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(layer.parameters()))
        layer(torch.ones(8)).sum().backward()
        self.optimizer.optimizer.step()


def test_a_full_disk_leaves_everything_where_it_is(tmp_path, monkeypatch):
    network = Network()
    layer = network.model_chunks[0]
    before = layer.weight.detach().clone()
    away = Offload(lambda: [network], lambda: DiskStore(str(tmp_path)))
    moments = network.optimizer.optimizer.state[layer.weight]

    def full(file, offset, num_bytes):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with refused("parallel.offload_folder", Cause.TOO_LARGE, tmp_path):
            away.free_memory(free_parameters=True)
    assert torch.equal(layer.weight, before) and away.offloaded_bytes == 0
    away.free_memory(free_parameters=True)
    assert layer.weight.untyped_storage().nbytes() == 0
    assert moments["exp_avg"].untyped_storage().nbytes() == 0
    assert moments["exp_avg_sq"].untyped_storage().nbytes() == 0
    assert away.offloaded_bytes == 3 * 4 * (64 + 8)
    away.prepare("measure_logprob_diff")
    assert away.offloaded_bytes == 3 * 4 * (64 + 8)
    away.prepare("compute_logprobs")
    assert torch.equal(layer.weight, before) and away.offloaded_bytes == 2 * 4 * (64 + 8)
    away.prepare("update")
    assert away.offloaded_bytes == 0 and moments["exp_avg"].any()


def test_memory_that_is_used_while_it_is_away_is_not_overwritten_in_silence():
    network = Network()
    away = Offload(lambda: [network], HostMemoryStore)
    away.free_memory(free_parameters=True)
    network.model_chunks[0].weight.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="4 bytes of parameters"):
        away.restore("parameters")


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(tmp_path):
    parallel = {"offload_between_phases": "disk", "offload_folder": str(tmp_path / "none")}
    config = parse_recipe({"rollout": {"colocated": True}, "parallel": parallel})
    with refused("parallel.offload_folder", Cause.UNREADABLE, tmp_path / "none"):
        make_offload(config, list)
