"""Engines whose ranks share a model: log-probabilities and experts as transformers has them."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from file_trainer import FilePusher
from liveness import is_alive
from sampled import (
    PROMPTS,
    TOLERANCE,
    largest_by_version,
    largest_difference,
    sample,
    sample_amid_a_push,
    successions,
)
from tiny_models import DEEPSEEK, QWEN, reference_routing, write_model

from megatron_r1.base.processes.scratch import shared_files
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.models.routing_shape import routing_shape

pytestmark = pytest.mark.more

MODELS = {"deepseek": DEEPSEEK, "qwen": QWEN}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("deepseek", {"tensor_parallel": 2, "expert_parallel": True}),
        pytest.param("deepseek", {"tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("deepseek", {"pipeline_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("deepseek", {"data_parallel": 2}, marks=pytest.mark.slow),
        pytest.param(
            "deepseek", {"data_parallel": 2, "expert_parallel": True}, marks=pytest.mark.slow
        ),
        pytest.param("qwen", {"tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("qwen", {"pipeline_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("qwen", {"data_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_engine_of_two_ranks_samples_as_transformers_would(family, layout, oracle, tmp_path):
    model = tmp_path / "model"
    oracle(write_model, model, MODELS[family], 0)
    replays = family == "deepseek" and "pipeline_parallel" not in layout
    routing = {"routing": routing_shape(DEEPSEEK)} if replays else {}

    async def start_and_sample():
        settings = {"max_model_len": 256, "max_num_seqs": 64, "return_routing": replays}
        async with EngineFleet(1, tmp_path, **settings, **layout) as fleet:
            await fleet.start(model)
            [engine] = fleet.engines
            return await sample(fleet, n=8, **routing), shared_files(engine.server.process.pid)

    groups, shared = asyncio.run(start_and_sample())
    assert not any(path.exists() for path in shared)
    assert largest_difference(oracle, model, groups) <= TOLERANCE
    if replays:
        assert fraction_of_equal_experts(oracle, model, groups, routing["routing"]) > 0.98


@pytest.mark.slow
def test_the_last_sequence_of_a_data_rank_is_sampled_as_transformers_would(oracle, tmp_path):
    # One token in a batch, over tensor x data ranks with spread experts: a share of it looks whole.
    model = tmp_path / "model"
    oracle(write_model, model, DEEPSEEK, 0)
    layout = {"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": True}

    async def start_and_sample():
        settings = {"max_model_len": 256, "max_num_seqs": 64, "return_routing": True}
        async with EngineFleet(1, tmp_path, **settings, **layout) as fleet:
            await fleet.start(model)
            return await sample(fleet, n=1, routing=routing_shape(DEEPSEEK))

    groups = asyncio.run(start_and_sample())
    assert largest_difference(oracle, model, groups) <= TOLERANCE
    assert fraction_of_equal_experts(oracle, model, groups, routing_shape(DEEPSEEK)) > 0.98


def fraction_of_equal_experts(oracle, folder, groups, shape):
    """Of tokens, by transformers; a near tie may fall either way."""
    equal = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(completion.token_ids) for completion in group]
        expected = oracle(reference_routing, folder, prompt, responses)
        for completion, rows in zip(group, expected, strict=True):
            got = np.frombuffer(completion.routing, np.uint8)
            got = np.sort(got.reshape(-1, len(shape.moe_layers), shape.topk), -1)
            equal.extend((got == np.array(rows)).all((1, 2)))
    return np.mean(equal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("deepseek", {"tensor_parallel": 2}),
        ("qwen", {"data_parallel": 2}),
        ("qwen", {"pipeline_parallel": 2}),
    ],
    ids=str,
)
def test_a_push_amid_responses_stamps_each_token_with_its_policy(family, layout, oracle, tmp_path):
    """Whose log-probability it has, given all earlier tokens: both ranks change between the same
    two."""
    before, after = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate((before, after)):
        oracle(write_model, folder, MODELS[family], seed)

    async def start_and_push():
        settings = {"max_model_len": 256, "max_num_seqs": 64}
        async with EngineFleet(1, tmp_path, **settings, **layout) as fleet:
            await fleet.start(before)
            pusher = FilePusher(MODELS[family], fleet, layout=layout)
            return await sample_amid_a_push(fleet, pusher.push, before, after)

    groups, made_by = asyncio.run(start_and_push())
    assert successions(groups) == {tuple(made_by)}
    assert largest_by_version(oracle, made_by, groups) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_takes_its_engine_with_it(how, oracle, tmp_path):
    model = tmp_path / "model"
    oracle(write_model, model, QWEN, 0)

    async def stop_amid():
        settings = {"max_model_len": 256, "tensor_parallel": 2, "max_restarts": 1}
        async with EngineFleet(1, tmp_path, unresponsive_seconds=5.0, **settings) as fleet:
            await fleet.start(model)
            first = processes_under(fleet.engines[0].server.process.pid)
            [rank] = [pid for pid, name in first.items() if name == "VLLM::Worker_TP1"]
            running = asyncio.ensure_future(sample(fleet, max_tokens=200))
            await asyncio.sleep(0.3)
            os.kill(rank, how)
            groups = await running
            second = processes_under(fleet.engines[0].server.process.pid)
            return groups, first, second, fleet.num_restarts

    groups, first, second, restarts = asyncio.run(stop_amid())
    assert restarts == 1
    assert largest_difference(oracle, model, groups) <= TOLERANCE
    assert set(first.values()) == set(second.values()) and not first.keys() & second.keys()
    left = [pid for pid in first | second if is_alive(pid)]
    assert not left


def processes_under(pid):
    """pid → name of a process and all below it."""
    found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().split(" ")[0]}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= processes_under(int(child))
    return found
