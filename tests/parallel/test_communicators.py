"""The plan's communicators against the groups that Megatron makes, and those that ranks use."""

import json
from pathlib import Path

import pytest
import trainer_steps
from ranks import run_ranks

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.communicators import group_sizes
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob

pytestmark = pytest.mark.more
HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "examples/deepseek_r1"


def planned_groups(hf_config: dict, config, world_size: int) -> dict[str, int]:
    job = PlannedJob(hf_config, config, world_size, HARDWARE["H800"])
    sizes = group_sizes(job).items()
    return {name: size for name, size in sizes if not name.startswith("stage")}


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        ("deepseek-yarn-mtp", "tp2xetp2xep2"),
        ("deepseek-yarn-mtp", "pp2xvp2xcp2"),
        ("qwen-untied", "tp2xpp2"),
    ],
)
def test_ranks_communicate_in_the_planned_groups(oracle, tmp_path, model, grid):
    folder = str(oracle / model)
    run_ranks(HERE, 4, "used_groups.py", folder, str(tmp_path), grid)
    used = {}
    for file in tmp_path.glob(f"{grid}.[0-9].json"):
        rows = json.loads(file.read_text())
        used |= {name: size for name, size, count in rows if count and size > 1}
    planned = planned_groups(read_hf_config(folder), trainer_steps.config(folder, grid), 4)
    assert used == planned


@pytest.mark.parametrize("rank", ["0", "2047"])
def test_their_sizes_in_the_largest_recipe_are_megatrons(rank):
    recipe = RECIPES / "r1_zero.yaml"
    made = json.loads(run_ranks(HERE, 1, "made_groups.py", str(recipe), rank).splitlines()[-1])
    config = configuration.load_recipe(recipe)
    planned = planned_groups(read_hf_config(RECIPES / "model"), config, config.parallel.processes)
    assert planned == {name: made[name] for name in planned}
    assert len(planned) == 11
