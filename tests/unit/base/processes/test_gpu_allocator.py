"""The environment of trainer ranks and engines, as far as torch's allocator on a GPU reads it."""

import os
from types import SimpleNamespace

import pytest

from megatron_r1.base.processes import process_memory
from megatron_r1.base.processes.process_memory import ALLOCATOR_VARIABLES
from megatron_r1.commands import cli
from megatron_r1.commands.parts import torchrun
from megatron_r1.config import parse_recipe
from megatron_r1.controller.trainer_calls import rank_processes
from megatron_r1.controller.trainer_calls.rank_processes import RankProcesses
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.settings import EngineSettings
from megatron_r1.models.device_connections import CONNECTIONS_VARIABLE
from megatron_r1.trainer import rank_server

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
ON = "expandable_segments:True"
TRAINERS = {"PYTORCH_CUDA_ALLOC_CONF": f"{ON},pinned_max_round_threshold_mb:1"}


@pytest.fixture(params=[True, False])
def has_gpu(request, monkeypatch):
    monkeypatch.setattr(gpu, "is_usable", lambda: request.param)
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return request.param


def allocator_of(environment):
    return {name: environment[name] for name in ALLOCATOR_VARIABLES if name in environment}


def test_ranks_on_gpus_let_segments_grow(has_gpu, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        rank_processes, "_start_rank", lambda command, log, own: started.append(own)
    )
    config = parse_recipe({"run": {"folder": "x"}, "parallel": {"processes": 2}})
    RankProcesses(tmp_path).start(config, "tcp://127.0.0.1:1", "secret")
    expected = TRAINERS if has_gpu else {}
    assert [allocator_of(own) for own in started] == [expected, expected]

    started.clear()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    RankProcesses(tmp_path).start(config, "tcp://127.0.0.1:1", "secret")
    assert not any(allocator_of(own) for own in started), "the user's own setting stays"


def test_ranks_on_gpus_are_told_how_many_connections(has_gpu, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        rank_processes, "_start_rank", lambda command, log, own: started.append(own)
    )
    monkeypatch.setattr(gpu, "architecture", lambda: 9)
    monkeypatch.delenv(CONNECTIONS_VARIABLE, raising=False)
    layout = {"processes": 2, "tensor": 2}
    config = parse_recipe({"run": {"folder": "x"}, "parallel": layout})
    RankProcesses(tmp_path).start(config, "tcp://127.0.0.1:1", "secret")
    assert [own.get(CONNECTIONS_VARIABLE) for own in started] == ["1" if has_gpu else None] * 2


def test_a_torch_that_may_not_know_how_pinned_memory_is_rounded_is_not_told(monkeypatch):
    """It would end the process: "Unrecognized key"."""
    for version, expected in {
        "2.12.1": {"PYTORCH_CUDA_ALLOC_CONF": ON},
        "2.13.0a0+8145d630e8.nv26.06": {"PYTORCH_CUDA_ALLOC_CONF": ON},
        "2.13.0+cu130": TRAINERS,
        "2.14.0": TRAINERS,
    }.items():
        monkeypatch.setattr(process_memory.metadata, "version", lambda name, found=version: found)
        assert process_memory.trainer_allocator({}) == expected, version


def test_ranks_under_torchrun_do_and_their_controller_does_not(has_gpu, monkeypatch):
    """Engines inherit the controller's environment."""
    seen = {}

    def popen(command, env, **options):
        seen["controller"] = env
        return SimpleNamespace(wait=lambda: 0)

    def serve(config, find_controller):
        seen["rank"] = dict(os.environ)

    for name, value in (RANK | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    for name in (*TRAINERS, torchrun.RANKS_TOKEN_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is removed at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(torchrun.subprocess, "Popen", popen)
    monkeypatch.setattr(rank_server, "serve_under_torchrun", serve)
    monkeypatch.setattr(gpu, "architecture", lambda: 9 if has_gpu else None)
    monkeypatch.setenv(CONNECTIONS_VARIABLE, "")
    recipe = parse_recipe({"run": {"folder": "x"}, "parallel": {"tensor": 2}})
    assert cli._serve_as_rank(recipe, ["rl", "x.yaml"]) == 0
    assert seen["rank"][CONNECTIONS_VARIABLE] == ("1" if has_gpu else "")
    assert not seen["controller"].get(CONNECTIONS_VARIABLE), "engines inherit the controller's"
    assert allocator_of(seen["rank"]) == (TRAINERS if has_gpu else {})
    assert allocator_of(seen["controller"]) == {}
    secret = seen["rank"][torchrun.RANKS_TOKEN_VARIABLE]
    assert seen["controller"][torchrun.RANKS_TOKEN_VARIABLE] == secret
    assert seen["controller"][torchrun.WORLD_SIZE] == "2" and "RANK" not in seen["controller"]


@pytest.mark.parametrize(
    ("device", "transport", "given", "replaced"),
    [
        ("cuda", "cuda_ipc", ON, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}),
        (
            *("cuda", "cuda_ipc", f"max_split_size_mb:512, {ON},a:b"),
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,a:b,expandable_segments:False"},
        ),
        ("cuda", "cuda_ipc", "max_split_size_mb:512", {}),
        ("cuda", "cuda_ipc", None, {}),
        ("cuda", "nccl", ON, {}),
        ("cpu", "cuda_ipc", ON, {}),
    ],
)
def test_engines_that_hand_out_memory_keep_segments_fixed(
    device, transport, given, replaced, monkeypatch
):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    backend = f"megatron_r1_{transport}"
    settings = EngineSettings(device=device, weight_transfer_backend=backend)
    assert allocator_of(settings.environment()) == replaced
