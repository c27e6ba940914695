"""Miniatures for a null GPU, and what is refused before one is made."""

from importlib import metadata
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import load
from megatron_r1.config.training import ParallelConfig
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.models.pipeline_stages import pipeline_stages
from megatron_r1.rehearse import launch, layout, miniature

EXAMPLES = Path(__file__).parents[3] / "examples"
SHIPPED = ("deepseek_r1/r1_zero", "deepseek_r1/reasoning_rl", "distill/qwen2.5-32b_rl")


@pytest.mark.parametrize("max_ranks", [8, 4, 2, 1])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_keeps_transport_placement_and_share_of_the_gpu(name, max_ranks, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load(EXAMPLES / f"{name}.yaml")
    hf = read_hf_config(config.model.path, None)
    small = miniature.shrink(config, hf, Path("rehearsal"), max_ranks, on="null-gpu").config
    assert small.push.transport == "nccl" and small.rollout.colocated
    assert small.rollout.gpu_memory == config.rollout.gpu_memory
    assert small.rollout.expert_parallel == config.rollout.expert_parallel
    # A trainer rank has a GPU of its own, which the engines' ranks divide.
    ranks = small.parallel.processes
    assert ranks <= max_ranks
    resumed = layout.different_layout(small.parallel).processes
    assert launch.num_null_gpus(small, "rl") == max(ranks, resumed)
    small.parallel.check_sizes(small.parallel.processes)
    shape = miniature.shrink(config, hf, Path("rehearsal"), max_ranks, on="null-gpu").hf
    num_mtp, at = shape.get("num_nextn_predict_layers") or 0, small.parallel
    sizes = shape["num_hidden_layers"], at.pipeline, at.virtual_pipeline
    pipeline_stages(*sizes, num_mtp=num_mtp, layout=at.pipeline_layout)
    assert at.pipeline > 1 or at.virtual_pipeline == 1


def test_axes_are_left_out_where_ranks_are_too_few():
    parallel = ParallelConfig(processes=64, tensor=8, context=2, pipeline=4)
    small = layout.shrink(parallel, 4, leaves_out=True)
    assert (small.processes, small.tensor, small.context, small.pipeline) == (4, 2, 1, 2)


@pytest.mark.parametrize(("cuda", "missing"), [(False, None), (True, "vllm")])
def test_an_environment_without_the_cuda_packages_is_refused(monkeypatch, cuda, missing):
    def version(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(launch.gpu, "torch_has_cuda", lambda: cuda)
    with refused("rehearsal.on", Cause.NOT_INSTALLED):
        launch.run_on_null_gpu(["rehearse", "r.yaml", "--on", "null-gpu"], 2)


def test_an_installation_without_the_tool_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "TOOL", tmp_path / "tools" / "null_gpu")
    with refused("rehearsal.on", Cause.NOT_INSTALLED):
        launch.run_on_null_gpu(["rehearse", "r.yaml"], 2)
