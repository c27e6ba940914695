"""The real recipe's estimate, and the remedies of one that does not fit."""

import re

import pytest
from planned_jobs import BY_HAND, LAPTOP, RECIPE, ROOT, V3, real_job

from megatron_r1 import config as configuration
from megatron_r1.commands.plan import main
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob


def test_a_larger_share_of_the_gpu_is_the_remedy_where_the_trainer_leaves_it():
    def problems(share: str) -> list[str]:
        fewer = {"rollout.engines": 4, "rl.schedule": [], "rollout.gpu_memory": share}
        fewer["rollout.vllm"] = {"max_num_batched_tokens": 256}
        config = configuration.load_recipe(RECIPE, BY_HAND | fewer)
        return JobEstimate(PlannedJob(V3, config, 512, HARDWARE["H800"])).problems()

    pattern = r"cache, which has .*: set rollout.gpu_memory to (0\.\d+), or"
    remedy = re.search(pattern, "\n".join(problems("0.5")))[1]
    assert problems(remedy) == []
    assert problems(f"{float(remedy) - 0.01:.2f}") != []


def test_the_real_recipe_fits_and_leaves_room_for_65536_tokens():
    estimate = JobEstimate(real_job())
    assert estimate.job.data_parallel_size == 16 and estimate.problems() == []
    config = configuration.load_recipe(RECIPE, {"rollout.max_response_tokens": 65_536})
    assert JobEstimate(PlannedJob(V3, config, 2048, HARDWARE["H800"])).problems() == []


@pytest.mark.more
def test_advice_is_not_what_the_recipe_does_or_its_model_cannot(capsys):
    dense = str(ROOT / "examples/distill/qwen2.5-32b_rl.yaml")
    assert main([dense, "--memory-gib", "20"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "recompute full" in output and "parallel.context" in output
    assert "parallel.expert" not in output and "rollout.tensor_parallel=8" in output
    assert main([*LAPTOP, "--memory-gib", "6.1"]) == 1
    output = capsys.readouterr().out
    assert "1.04 GiB" in output and "parallel.recompute" in output
    assert main([*LAPTOP, "--memory-gib", "5"]) == 1
    assert "reserved" in capsys.readouterr().out
