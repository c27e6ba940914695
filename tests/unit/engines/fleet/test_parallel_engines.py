"""Settings of engines with ranks: what is refused before anything starts, and vLLM's arguments."""

import asyncio
import json
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import load_recipe, parse_recipe
from megatron_r1.engines.fleet.engine_fleet import EngineFleet, with_gpu_share
from megatron_r1.engines.server import recipe_checks
from megatron_r1.engines.server.model_config import vocab_size
from megatron_r1.engines.server.recipe_checks import check_engines, check_local_engines
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.push.matching import EngineLayout
from megatron_r1.push.matching.recipe_plan import check_pushes, engine_layout

ROOT = Path(__file__).parents[4]
DENSE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 190,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
EXPERTS = DENSE | {"n_routed_experts": 8}
GPT_OSS = EXPERTS | {"architectures": ["GptOssForCausalLM"]}
LATENT = DENSE | {"num_attention_heads": 6, "num_key_value_heads": 1, "kv_lora_rank": 512}


def config(rl=None, **rollout):
    return parse_recipe({"rollout": rollout, "rl": rl or {}})


@pytest.mark.parametrize(
    ("hf_config", "settings", "key", "cause", "shown"),
    [
        (
            DENSE,
            {"tensor_parallel": 5},
            "tensor_parallel",
            Cause.INDIVISIBLE,
            "num_attention_heads=12",
        ),
        (
            DENSE,
            {"tensor_parallel": 6},
            "tensor_parallel",
            Cause.INDIVISIBLE,
            "num_key_value_heads=4",
        ),
        (
            {"text_config": DENSE},
            {"tensor_parallel": 5},
            "tensor_parallel",
            Cause.INDIVISIBLE,
            "tensor_parallel=5",
        ),
        (
            DENSE | {"vocab_size": 67},
            {"tensor_parallel": 12},
            "tensor_parallel",
            Cause.INDIVISIBLE,
            "128",
        ),
        (DENSE, {"pipeline_parallel": 4}, "pipeline_parallel", Cause.TOO_LARGE, "3 layers"),
        (DENSE, {"expert_parallel": True}, "expert_parallel", Cause.CONFLICT, "false"),
        (
            *(EXPERTS, {"expert_parallel": True, "tensor_parallel": 4, "data_parallel": 4}),
            *("expert_parallel", Cause.TOO_LARGE, "16 ranks"),
        ),
        (EXPERTS, {"redundant_experts": 2}, "redundant_experts", Cause.CONFLICT, "false"),
        (
            *(EXPERTS, {"redundant_experts": 2, "expert_parallel": True}),
            *("redundant_experts", Cause.CONFLICT, "on 1 of them"),
        ),
        (
            *(EXPERTS, {"redundant_experts": 3, "expert_parallel": True, "data_parallel": 4}),
            *("redundant_experts", Cause.INDIVISIBLE, "4 copies can"),
        ),
        (
            GPT_OSS,
            {"tensor_parallel": 12},
            "tensor_parallel",
            Cause.INDIVISIBLE,
            "num_key_value_heads=4",
        ),
        (
            *(EXPERTS, {"pipeline_parallel": 2, "rl": {"routing_replay": True}}),
            *("pipeline_parallel", Cause.CONFLICT, "rl.routing_replay"),
        ),
    ],
)
def test_what_no_engine_can_serve_is_refused(hf_config, settings, key, cause, shown):
    with refused(f"rollout.{key}", cause, shown):
        check_engines(config(**settings), hf_config)


def test_copies_of_experts_need_gpus_where_engines_run():
    settings = {"redundant_experts": 4, "expert_parallel": True, "data_parallel": 4}
    check_engines(config(**settings), EXPERTS)  # a plan for GPUs needs none
    check_local_engines(config(**settings, placement="hosts").rollout)
    with refused("rollout.redundant_experts", Cause.UNSUPPORTED, "needs GPUs"):
        check_local_engines(config(**settings).rollout)


def test_engines_on_this_host_need_vllm(monkeypatch):
    monkeypatch.setattr(recipe_checks, "find_spec", lambda name: None)
    check_local_engines(config(placement="hosts").rollout)
    with refused("rollout.placement", Cause.NOT_INSTALLED, "vllm is not installed in"):
        check_local_engines(config().rollout)


@pytest.mark.parametrize("name", ["all2all_backend", "all2all-backend"])
def test_an_exchange_by_deepep_needs_its_package_where_engines_run(name):
    settings = {"vllm": {name: "deepep_low_latency"}}
    check_local_engines(config(**settings, placement="hosts").rollout)
    check_local_engines(config(vllm={name: "allgather_reducescatter"}).rollout)
    with refused("rollout.vllm.all2all_backend", Cause.NOT_INSTALLED, "deep_ep"):
        check_local_engines(config(**settings).rollout)


def test_models_that_no_engine_computes_as_the_trainer_does_are_refused():
    deepseek = LATENT | {"architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc"}
    check_engines(config(), deepseek)  # the engine gets what transformers does not write
    with refused("scoring_func", Cause.UNSUPPORTED, "sigmoid"):
        check_engines(config(), deepseek | {"scoring_func": "softmax"})
    with refused("rollout", Cause.INDIVISIBLE, "5 ranks", "intermediate_size=96"):
        check_engines(config(data_parallel=5), GPT_OSS)


@pytest.mark.parametrize(
    ("hf_config", "settings"),
    [
        (DENSE, {"tensor_parallel": 12, "pipeline_parallel": 3, "data_parallel": 4}),
        (EXPERTS, {"tensor_parallel": 4, "data_parallel": 2, "expert_parallel": True}),
        (
            LATENT,
            {"tensor_parallel": 6},
        ),  # every rank holds the latents, so that heads need not divide
    ],
)
def test_what_engines_can_serve_is_not(hf_config, settings):
    check_engines(config(**settings), hf_config)


def test_what_cannot_be_pushed_to_is_refused_too():
    check_pushes(config(tensor_parallel=4), DENSE, world_size=1)
    with refused("rollout.tensor_parallel", Cause.INDIVISIBLE, 90):
        check_pushes(config(tensor_parallel=4), DENSE | {"intermediate_size": 90}, world_size=1)


def test_the_layout_is_the_recipes():
    recipe = config(
        engines=3, tensor_parallel=4, pipeline_parallel=2, data_parallel=5, expert_parallel=True
    )
    assert engine_layout(recipe) == EngineLayout(3, 4, 5, 2, True)


def test_engines_that_sleep_leave_nothing_to_sample_ahead():
    config(colocated=True)
    with refused("rollout.colocated", Cause.CONFLICT, "rl.staleness"):
        config(colocated=True, rl={"staleness": 1, "importance_cap": 2.0})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_gets_the_settings_as_arguments(tmp_path, device):
    server = EngineServer(
        tmp_path,
        tmp_path / "log",
        device=device,
        tensor_parallel=2,
        pipeline_parallel=3,
        data_parallel=4,
        expert_parallel=True,
        enable_sleep_mode=True,
        gpu_memory=0.4,
        num_threads=30,
    )
    arguments = " ".join(server.arguments)
    for words in (
        "--tensor-parallel-size 2",
        "--pipeline-parallel-size 3",
        "--data-parallel-size 4",
        "--enable-expert-parallel",
    ):
        assert words in arguments
    assert ("--gpu-memory-utilization 0.4" in arguments) == (device == "cuda")
    assert ("--enable-sleep-mode" in arguments) == (device == "cuda")  # a CPU has no such allocator
    assert server.environment.get("OMP_NUM_THREADS") == ("1" if device == "cpu" else None)


def test_engines_of_one_host_get_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5")
    settings = {"device": "cuda", "extra_env": {"A": "b"}}
    shares = [with_gpu_share(settings, index, 2)["extra_env"] for index in range(2)]
    assert shares == [
        {"CUDA_VISIBLE_DEVICES": "2,3", "A": "b"},
        {"CUDA_VISIBLE_DEVICES": "4,5", "A": "b"},
    ]
    assert with_gpu_share(settings, 0, 1) == settings
    assert with_gpu_share({"device": "cpu"}, 1, 2) == {"device": "cpu"}


def test_engines_on_other_hosts_get_none_of_this_hosts_gpus(tmp_path):
    settings = []

    class Elsewhere:
        def __init__(self, model, log, **server_settings):
            settings.append(server_settings)

        def start(self): ...

    async def launch():
        fleet = EngineFleet(2, tmp_path, device="cuda", make_server=Elsewhere)
        fleet._model = tmp_path
        fleet.launch(1)

    asyncio.run(launch())
    assert settings[0]["device"] == "cuda" and "extra_env" not in settings[0]


def test_an_engine_takes_as_many_sequences_as_all_its_copies(tmp_path):
    limits = [
        EngineFleet(1, tmp_path, **engine_settings(recipe.rollout)).state.dispatcher.limit
        for recipe in (config(max_num_seqs=8), config(max_num_seqs=8, data_parallel=4))
    ]
    assert limits[1] == 4 * limits[0]


def test_the_vocabulary_is_the_language_models(tmp_path):
    for hf_config, size in [(DENSE, 190), ({"text_config": DENSE}, 190), ({}, None)]:
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        assert vocab_size(tmp_path) == size


@pytest.mark.parametrize("name", ["r1_zero", "reasoning_rl", "all_scenarios_rl"])
def test_the_large_recipes_push_from_stages_with_mtp_layers(name):
    recipe = load_recipe(ROOT / f"examples/deepseek_r1/{name}.yaml")
    assert "m" in recipe.parallel.pipeline_layout
    hf_config = read_hf_config(ROOT / recipe.model.path)
    check_pushes(recipe, hf_config, recipe.parallel.processes)
    changed = {"model.mtp": "none"}
    without = load_recipe(ROOT / f"examples/deepseek_r1/{name}.yaml", changed)
    with refused("rollout.speculative.method", Cause.CONFLICT):
        check_pushes(without, hf_config, world_size=2048)
    changed["rollout.speculative.method"] = "none"
    without = load_recipe(ROOT / f"examples/deepseek_r1/{name}.yaml", changed)
    with refused("parallel.pipeline_layout", Cause.CONFLICT):
        check_pushes(without, hf_config, world_size=2048)
