"""Miniatures for a null GPU, and what is refused before one is made."""

from importlib import metadata
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import load_recipe
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.pipeline_stages import pipeline_stages
from megatron_r1.rehearse import launch, layout, miniature, null_gpu

EXAMPLES = Path(__file__).parents[3] / "examples"
SHIPPED = ("deepseek_r1/r1_zero", "deepseek_r1/reasoning_rl", "distill/qwen2.5-32b_rl")


@pytest.mark.parametrize("max_ranks", [8, 4, 2, 1])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_keeps_transport_placement_and_share_of_the_gpu(name, max_ranks, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load_recipe(EXAMPLES / f"{name}.yaml")
    hf_config = read_hf_config(config.model.path, None)
    small = miniature.make_miniature(
        config, hf_config, Path("rehearsal"), max_ranks, device="null-gpu"
    ).config
    assert small.push.transport == "nccl" and small.rollout.colocated
    assert small.rollout.gpu_memory == config.rollout.gpu_memory
    assert small.rollout.expert_parallel == config.rollout.expert_parallel
    # A trainer rank has a GPU of its own, which the engines' ranks divide.
    ranks = small.parallel.processes
    assert ranks <= max_ranks
    resumed = layout.different_layout(small.parallel).processes
    assert null_gpu.num_null_gpus(small, "rl") == max(ranks, resumed)
    small.parallel.check_sizes(small.parallel.processes)
    shape = miniature.make_miniature(
        config, hf_config, Path("rehearsal"), max_ranks, device="null-gpu"
    ).hf_config
    num_mtp, at = shape.get("num_nextn_predict_layers") or 0, small.parallel
    sizes = shape["num_hidden_layers"], at.pipeline, at.virtual_pipeline
    pipeline_stages(*sizes, num_mtp=num_mtp, layout=at.pipeline_layout)
    assert at.pipeline > 1 or at.virtual_pipeline == 1


@pytest.mark.parametrize(("max_ranks", "ranks"), [(8, 4), (2, 2), (1, 1)])
def test_experts_are_balanced_with_copies_that_both_runs_can_share(max_ranks, ranks, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load_recipe(EXAMPLES / "deepseek_r1/r1_zero.yaml")
    assert config.rollout.redundant_experts == 128
    hf_config = read_hf_config(config.model.path, None)
    small = miniature.make_miniature(
        config, hf_config, Path("rehearsal"), max_ranks, device="null-gpu"
    )
    rollout = small.config.rollout
    assert rollout.tensor_parallel * rollout.data_parallel == ranks
    assert rollout.redundant_experts == (ranks if ranks > 1 else 0)
    assert ("eplb_config" in rollout.vllm) == (ranks > 1)
    fewer = rollout.model_copy(update=layout.fewer_engine_ranks(rollout))
    for changed in ({}, layout.fewer_engine_ranks(rollout)):
        check_engines(small.config.with_changes(rollout=changed), small.hf_config)
    if ranks > 1:  # the resumed run balances as well
        assert (fewer.tensor_parallel, fewer.data_parallel, fewer.redundant_experts) == (
            2,
            1,
            ranks,
        )


def test_arguments_of_vllm_stay_where_a_null_gpu_imitates_their_kernels(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    given = {"all2all_backend": "deepep_low_latency", "kv_cache_dtype": "fp8"}
    for values, kept in ((given, set()), ({}, {"all2all_backend", "kv_cache_dtype"})):
        config = load_recipe(EXAMPLES / "deepseek_r1/r1_zero.yaml")
        config = config.with_changes(rollout={"vllm": {**config.rollout.vllm, **values}})
        hf_config = read_hf_config(config.model.path, None)
        small = miniature.make_miniature(
            config, hf_config, Path("rehearsal"), 2, device="null-gpu"
        ).config.rollout
        chunks = {"enable_chunked_prefill", "max_num_batched_tokens", "eplb_config"}
        assert set(small.vllm) == chunks | kept
        assert small.vllm["max_num_batched_tokens"] < small.max_model_len - 24, "no prompt in parts"
        on_gpu = miniature.make_miniature(
            config, hf_config, Path("rehearsal"), 2, device="gpu"
        ).config.rollout
        assert set(on_gpu.vllm) == set(config.rollout.vllm) | {"eplb_config"}
        on_cpu = miniature.make_miniature(config, hf_config, Path("rehearsal"), 16).config.rollout
        assert not on_cpu.vllm and not on_cpu.redundant_experts


@pytest.mark.parametrize(
    ("device", "backend"), [("gpu", "fused"), ("null-gpu", "auto"), ("cpu", "auto")]
)
def test_attention_is_the_recipes_on_gpus(device, backend, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load_recipe(EXAMPLES / "deepseek_r1/r1_zero.yaml")
    hf_config = read_hf_config(config.model.path, None)
    # Axes are left out for few ranks on GPUs alone.
    small = miniature.make_miniature(config, hf_config, Path("rehearsal"), 8, device=device)
    assert small.config.model.attention_backend == backend


@pytest.mark.parametrize("colocated", [False, True])
def test_engine_hosts_have_gpus_of_their_own_or_the_trainers(colocated, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    name = "r1_zero" if colocated else "r1_zero_pools"
    spread = {"rollout.placement": "hosts", "rollout.hosts_per_engine": 16} if colocated else {}
    config = load_recipe(EXAMPLES / f"deepseek_r1/{name}.yaml", spread)
    hf_config = read_hf_config(config.model.path, None)
    small = miniature.make_miniature(
        config, hf_config, Path("rehearsal"), 2, device="null-gpu"
    ).config
    number = null_gpu.num_null_gpus(small, "rl")
    assert number == (4 if colocated else 6)  # the resumed run has 4 trainer ranks
    monkeypatch.setattr(launch.gpu, "is_usable", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number))))
    fewer = small.with_changes(rollout=layout.fewer_engine_ranks(small.rollout))
    for run, sizes in ((small, [1, 1]), (fewer, [2])):
        trainer, hosts = launch.gpu_environments("rl", run)
        of_hosts = [each["CUDA_VISIBLE_DEVICES"].split(",") for each in hosts]
        assert list(map(len, of_hosts)) == sizes
        taken = [own for each in of_hosts for own in each]
        assert len(set(taken)) == len(taken)
        is_shared = set(taken) <= set(trainer["CUDA_VISIBLE_DEVICES"].split(","))
        assert is_shared == colocated and (is_shared or len(trainer) == 1)


def test_axes_are_left_out_where_ranks_are_too_few():
    parallel = ParallelConfig(processes=64, tensor=8, context=2, pipeline=4)
    small = layout.shrink_layout(parallel, 4, leaves_out=True)
    assert (small.processes, small.tensor, small.context, small.pipeline) == (4, 2, 1, 2)


@pytest.mark.parametrize(("cuda", "missing"), [(False, None), (True, "vllm")])
def test_an_environment_without_the_cuda_packages_is_refused(monkeypatch, cuda, missing):
    def version(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(null_gpu.gpu, "torch_has_cuda", lambda: cuda)
    with refused("rehearsal.on", Cause.NOT_INSTALLED):
        null_gpu.run_on_null_gpu(["rehearse", "r.yaml", "--on", "null-gpu"], 2)


def test_an_installation_without_the_tool_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(null_gpu, "TOOL", tmp_path / "tools" / "null_gpu")
    with refused("rehearsal.on", Cause.NOT_INSTALLED):
        null_gpu.run_on_null_gpu(["rehearse", "r.yaml"], 2)
