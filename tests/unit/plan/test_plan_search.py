"""Layouts that are suggested where the recipe's does not fit."""

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from planned_jobs import RECIPE, ROOT, real_job

from megatron_r1.commands.plan import main
from megatron_r1.models import weights
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.search import even_layout, nearest_layouts


def test_a_layout_that_cannot_work_names_the_number_and_those_that_can(capsys):
    assert main([str(RECIPE), "--gpus", "2048", "--parallel.recompute", "none"]) == 1
    output = capsys.readouterr().out
    assert "activations" in output and "--parallel.recompute full" in output
    job = real_job(recompute="none")
    for found in nearest_layouts(job, 3):
        assert JobEstimate(job.with_parallel(**found.changes)).problems() == []


@pytest.mark.parametrize(
    ("recipe", "options", "sizes"),
    [
        ("distill/llama-3.1-8b", ["--gpus", "7"], ["--gpus 4", "--gpus 8"]),
        ("distill/llama-3.1-8b", ["--gpus", "100000"], ["--gpus 256"]),
        ("deepseek_r1/cold_start_sft", ["--gpus", "8"], ["--gpus 512"]),
        pytest.param(
            "deepseek_r1/r1_zero",
            ["--gpus", "128", "--rollout.engines", "1"],
            ["--gpus 2048 --rollout.engines 16"],  # on 1,024 trainers leave engines 0.72
            marks=pytest.mark.more,
        ),
    ],
)
def test_where_no_layout_fits_the_numbers_of_gpus_that_do_are_named(capsys, recipe, options, sizes):
    path = str(ROOT / f"examples/{recipe}.yaml")
    assert main([path, *options]) == 1
    named = capsys.readouterr().out.rpartition("the recipe's layout fits with ")[2].strip()
    assert named.split(" or ") == sizes
    for size in sizes:
        assert main([path, *options, *size.split()]) == 0, size


@pytest.mark.parametrize("chunks", [2, 4, 8, 16, 32])
def test_suggested_layouts_hold_every_layer(chunks):
    layout = even_layout(61, 1, chunks)
    stages = weights.pipeline_stages(61, chunks, num_mtp=1, layout=layout)
    PipelineParallelLayerLayout(layout, chunks).validate_layer_layout(61, 1)
    lengths = [len(chunk.layers) for stage in stages for chunk in stage]
    assert sum(lengths) == 61 and max(lengths[:-1]) - min(lengths[:-1]) <= 1
    assert 1 <= lengths[-1] <= max(lengths)
