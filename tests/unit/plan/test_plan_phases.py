"""A later part of `rl.schedule` that does not fit is named by `megatron-r1 plan`."""

from dataclasses import replace
from pathlib import Path

from planned_jobs import LAPTOP, ROOT

from megatron_r1.commands.plan import main
from megatron_r1.config import load_recipe
from megatron_r1.models import read_hf_config
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job import PlannedJob

RECIPE = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def test_a_64k_part_without_memory_is_refused_though_the_first_fits(capsys):
    # Engines need less of a GPU than the trainer, then.
    smaller = {"push.transport": "gloo", "rollout.gpu_memory": 0.65}
    config = load_recipe(RECIPE, smaller)
    hf_config = read_hf_config(config.model.path)

    def fits(gib: float) -> bool:
        hardware = replace(HARDWARE["H800"], memory=gib * GIB)
        return not JobEstimate(PlannedJob(hf_config, config, 2048, hardware)).problems()

    least = next(quarters / 4 for quarters in range(200, 320) if fits(quarters / 4))
    options = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    assert main([str(RECIPE), *options, "--memory-gib", str(least)]) == 1
    first, _, later = capsys.readouterr().out.partition("\nfrom step 513 (")
    assert "does not fit: " not in first
    assert later.startswith("rollout.max_response_tokens=65536; --step 513 shows all)")
    assert "  does not fit: pipeline rank " in later


def test_a_change_from_the_first_step_on_is_in_the_bill(capsys):
    first = "{from_step: 1, rollout.max_response_tokens: 24}"
    assert main([*LAPTOP, "--rl.schedule", f"[{first}]"]) == 0
    assert "from step" not in capsys.readouterr().out
    later = "{from_step: 21, rollout.max_response_tokens: 32}"
    assert main([*LAPTOP, "--rl.schedule", f"[{first}, {later}]"]) == 0
    output = capsys.readouterr().out
    assert "from step 21 (" in output and "from step 1 (" not in output
    assert "\nthe run of 40 steps: " in output


def test_only_rl_follows_a_schedule(capsys):
    recipe = str(ROOT / "examples/deepseek_r1/cold_start_sampling.yaml")
    schedule = "[{from_step: 2, rollout.max_response_tokens: 1024}]"
    assert main([recipe, "--rl.schedule", schedule]) == 0
    assert "from step" not in capsys.readouterr().out
