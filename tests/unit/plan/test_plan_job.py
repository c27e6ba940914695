"""Numbers of GPUs and samples that a job cannot use, and those that it could."""

import re

import pytest
from planned_jobs import RECIPE

from megatron_r1.commands.plan import main
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.recipe_job import planned_job


def test_numbers_of_gpus_below_one_engine_are_not_tried(capsys):
    layout = ("--parallel.pipeline", "1", "--parallel.pipeline_layout", "null")
    experts = ("--parallel.tensor", "4", "--parallel.expert", "64", "--rollout.data_parallel", "64")
    assert main([str(RECIPE), *layout, *experts]) == 1
    assert "512 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("staleness", [pytest.param("0", marks=pytest.mark.more), "1"])
def test_engines_that_are_not_colocated_are_told_what_gives_them_gpus(capsys, staleness):
    options = ["--rollout.colocated", "false", "--rl.staleness", staleness]
    options += ["--rl.importance_cap", "2", "--push.transport", "gloo"]
    assert main([str(RECIPE), *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    advice = re.search(r"rollout.colocated is false.* pass (--rollout-gpus 2048) assumed", output)
    assert advice
    assert main([str(RECIPE), *options, *advice[1].split()]) == 0
    assert "rollout.colocated" not in capsys.readouterr().out
    assert main([str(RECIPE)]) == 0
    assert "rollout.colocated" not in capsys.readouterr().out


def test_engine_hosts_that_are_not_colocated_are_gpus_of_their_own():
    apart = ["--rollout.placement", "hosts", "--rollout.colocated", "false"]

    def rollout_gpus(*options: str) -> int:
        chosen, overrides = parse_job_arguments([str(RECIPE), *options])
        return planned_job(RECIPE, chosen, overrides).rollout_gpus

    assert rollout_gpus(*apart, "--rollout.engines", "3") == 3 * 8 * 16
    assert rollout_gpus(*apart, "--rollout-gpus", "2048") == 2048
    assert rollout_gpus(*apart[:2]) == rollout_gpus(*apart[2:]) == 0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("r1_zero", ["--gpus", "512"]),
        ("r1_zero", ["--gpus", "1024"]),
        ("r1_zero", ["--gpus", "2047"]),
        ("r1_zero", ["--gpus", "100000"]),
        ("r1_zero", ["--gpus", "64"]),
        pytest.param("r1_zero", ["--rollout.engines", "32"], marks=pytest.mark.more),  # 3 plans
        ("r1_zero", ["--rollout-gpus", "1000"]),
        ("cold_start_sampling", ["--gpus", "2048"]),
        ("helpful_pairs", ["--gpus", "2048"]),
        ("rejection_sampling", ["--gpus", "2000"]),
        ("safety_labels", ["--gpus", "7"]),
        ("../distill/qwen2.5-32b_rl", ["--gpus", "2048"]),
        ("../distill/qwen2.5-math-7b_on_policy", ["--gpus", "2048"]),
        ("../distill/qwen2.5-math-7b_on_policy", ["--gpus", "7"]),
    ],
)
def test_engines_that_do_not_make_up_the_gpus_are_told_how_many_would(
    capsys, monkeypatch, recipe, options
):
    monkeypatch.setattr("megatron_r1.commands.plan.nearest_layouts", lambda job: [])
    path = str(RECIPE.parent / f"{recipe}.yaml")
    assert main([path, *options]) == 1
    advice = capsys.readouterr().out.rpartition("; set ")[2].splitlines()[0]
    for way in advice.partition(", or lower")[0].split(" or "):
        main([path, *options, *way.split()])
        assert "rollout.engines=" not in capsys.readouterr().out


def test_too_few_samples_are_told_what_gives_more_of_them_and_how_many_gpus_they_feed(capsys):
    few = ["--rl.prompts_per_rollout", "1", "--rl.group_size", "8", "--rl.minibatches", "1"]
    assert main([str(RECIPE), *few]) == 1
    output = capsys.readouterr().out
    for shown in ("8 samples", "16 data-parallel", "rl.prompts_per_rollout", "1,024 GPUs"):
        assert shown in output


def test_engines_are_told_the_nearest_numbers_on_both_sides(capsys):
    assert main([str(RECIPE), "--gpus", "2047"]) == 1
    output = capsys.readouterr().out
    for shown in (
        "rollout.engines=16",
        "rollout.tensor_parallel=8",
        "rollout.data_parallel=16",
        "2,047",
    ):
        assert shown in output
    for remedy in ("--gpus 1920 --rollout.engines 15", "--gpus 2048 --rollout.engines 16"):
        assert remedy in output
