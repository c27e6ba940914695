"""Real Megatron ranks push to real vLLM ranks, laid out otherwise.

Oracles: an engine that was started on the same weights, tensor for tensor (vLLM's own checksums of
what it computes with), and transformers' log-probabilities.
"""

import asyncio

import pytest
from engine_checksums import checksums
from file_trainer import FilePusher
from sampled import PROMPTS, TOLERANCE, largest_difference, sample
from tiny_models import (
    DEEPSEEK,
    DEEPSEEK_V2,
    GLM,
    GLM_LITE,
    GPT_OSS,
    KIMI,
    PLAIN_YARN,
    QWEN,
    QWEN3,
    QWEN3_MOE,
    write_model,
)

from megatron_r1.config import Config
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.prober import Prober
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.controller.supervision.hang_diagnosis import inspect_trainer
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.models.weights import hf_tensors
from megatron_r1.push import link_planner
from megatron_r1.push.matching import EngineLayout
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.published_sharding import PublishedSharding

MODELS = {
    **{"deepseek": DEEPSEEK, "qwen": QWEN, "qwen3-moe": QWEN3_MOE, "glm": GLM},
    "qwen3": QWEN3 | {"rope_parameters": PLAIN_YARN},
    **{"glm-lite": GLM_LITE, "kimi": KIMI, "deepseek-v2": DEEPSEEK_V2},
    "gpt-oss": GPT_OSS,
}
ENGINE = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 1}
TRAINERS = {
    "deepseek": [
        {"tensor": 2},
        {"pipeline": 2, "pipeline_layout": "Ett|tL"},
        {"expert": 2},
        {"tensor": 2, "expert": 2, "expert_tensor": 1},
        {"tensor": 2, "expert_tensor": 2},
    ],
    "qwen": [{"tensor": 2}, {"pipeline": 2}, {"processes": 2}],
    "qwen3": [{"tensor": 2}],
    "qwen3-moe": [{"tensor": 2, "expert": 2, "expert_tensor": 1}, {"pipeline": 2}],
    "glm": [{"tensor": 2, "expert": 2, "expert_tensor": 1}],
    "glm-lite": [{"expert": 2}],
    "kimi": [{"tensor": 2}],
    "deepseek-v2": [{"expert": 2}],
    "gpt-oss": [{"tensor": 2, "expert": 2}, {"pipeline": 2}],
}
BOTH_AXES = {"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": True}
"""The axes of the 671B recipes' engines."""
IN_MORE = (("gpt-oss", BOTH_AXES), ("deepseek-v2", {"pipeline_parallel": 2}))
"""Families with engines' layouts that `make test-more` pushes to."""


@pytest.mark.parametrize(
    ("family", "layout", "trainers", "push"),
    [
        pytest.param(
            "deepseek",
            {"tensor_parallel": 2, "expert_parallel": True},
            [{"tensor": 2, "expert": 2, "expert_tensor": 1}],
            {"transport": "gloo"},
            id="deepseek-one",
        ),
        *(
            pytest.param(
                family,
                layout,
                TRAINERS[family],
                {"transport": transport},
                id=f"{family}-{'-'.join(layout) or 'one'}-{transport}",
                marks=pytest.mark.more if (family, layout) in IN_MORE else pytest.mark.slow,
            )
            for family, layout, transport in [
                ("deepseek", {}, "shm"),
                ("deepseek", {"tensor_parallel": 2}, "gloo"),
                ("deepseek", {"tensor_parallel": 2, "expert_parallel": True}, "shm"),
                ("deepseek", {"data_parallel": 2, "expert_parallel": True}, "shm"),
                ("deepseek", BOTH_AXES, "shm"),
                ("deepseek", {"pipeline_parallel": 2}, "shm"),
                ("qwen", {}, "gloo"),
                ("qwen", {"tensor_parallel": 2}, "shm"),
                ("qwen", {"pipeline_parallel": 2}, "shm"),
                ("qwen3", {"tensor_parallel": 2}, "shm"),
                ("qwen3-moe", {"tensor_parallel": 2, "expert_parallel": True}, "shm"),
                ("qwen3-moe", BOTH_AXES, "shm"),
                ("glm", {"tensor_parallel": 2}, "shm"),
                ("glm", BOTH_AXES, "shm"),
                ("glm-lite", {}, "shm"),
                ("glm-lite", BOTH_AXES, "shm"),
                ("kimi", {"tensor_parallel": 2, "expert_parallel": True}, "shm"),
                ("deepseek-v2", {"pipeline_parallel": 2}, "shm"),
                ("deepseek-v2", BOTH_AXES, "shm"),
                ("gpt-oss", {}, "shm"),
                ("gpt-oss", {"tensor_parallel": 2}, "gloo"),
                ("gpt-oss", {"tensor_parallel": 2, "expert_parallel": True}, "shm"),
                ("gpt-oss", BOTH_AXES, "shm"),
                ("gpt-oss", {"pipeline_parallel": 2}, "shm"),
            ]
        ),
    ],
)
def test_after_a_push_an_engine_is_as_if_started_on_the_trainers_weights(
    family, layout, trainers, push, oracle, tmp_path, monkeypatch
):
    found = recorded_layouts(monkeypatch)
    config = MODELS[family]
    known = resolve_aliases(config)
    for seed, name in enumerate("ab"):
        oracle(write_model, tmp_path / name, config, seed)
    before, trained = tmp_path / "a", tmp_path / "b"

    async def run():
        async with EngineFleet(1, tmp_path / "started", **ENGINE, **layout) as fleet:
            await fleet.start(trained)
            expected = await checksums(fleet)
        backend = f"megatron_r1_{push['transport']}"
        settings = ENGINE | layout | {"weight_transfer_backend": backend}
        settings["extra_args"] = ["--load-format", "dummy"]  # as rl starts engines
        async with EngineFleet(1, tmp_path / "pushed", **settings) as fleet:
            await fleet.start(before)
            for parallel in trainers:
                # So that every trainer finds other weights than its own.
                await FilePusher(known, fleet, layout=layout, **push).push(before)
                assert await checksums(fleet) != expected
                assert_predicted(known, EngineLayout(**layout), found[0])
                metrics = await push_from(trained, known, parallel, fleet, layout, push)
                assert await checksums(fleet) == expected, parallel
                assert metrics["push/probe_diff"] < TOLERANCE
                groups = await sample(fleet, n=2)
                assert largest_difference(oracle, trained, groups) < TOLERANCE, parallel

    async def push_from(folder, hf_config, parallel, fleet, layout, push):
        settings = {
            "model": {"path": str(folder), "dtype": "float32"},
            "parallel": {"processes": 2, "threads": 1, **parallel},
            "push": push,
        }
        recipe = Config.model_validate(settings)
        trainer = TrainerClient(recipe, tmp_path / "trainer")
        trainer.launch()
        try:
            await trainer.connect()
            # A report of a hang has the coordinates of real ranks.
            details = (await inspect_trainer(trainer)).details
            assert any(line.startswith("rank 1 (tensor ") for line in details), details
            shapes = hf_tensors(hf_config, with_mtp=False)
            tensors = [(name, shape) for name, (shape, _) in shapes.items()]
            links = EngineLinks(trainer, recipe.push, tensors, EngineLayout(**layout))
            pusher = WeightPusher(fleet, links, Prober(trainer, PROMPTS, TOLERANCE, 600))
            async with pusher.updating_weights():
                await pusher.open()
                await pusher.push(fleet.policy_version + 1)
            return await pusher.probe_results()
        finally:
            await trainer.close()

    asyncio.run(run())


def recorded_layouts(monkeypatch) -> list[PublishedSharding]:
    """Layouts of real engines as senders in this process read them, the first one first."""
    found: list[PublishedSharding] = []

    def recorded(*arguments):
        found.append(PublishedSharding(*arguments))
        return found[-1]

    monkeypatch.setattr(link_planner, "PublishedSharding", recorded)
    return found


def assert_predicted(hf_config, layout, found):
    """What every rank of a real engine needs is what is planned without one."""
    planned, needed = PredictedSharding(hf_config, layout).regions, found.regions
    differing = {n for n in planned.keys() | needed if planned.get(n) != needed.get(n)}
    assert not differing, [(n, planned.get(n), needed.get(n)) for n in sorted(differing)[:5]]
