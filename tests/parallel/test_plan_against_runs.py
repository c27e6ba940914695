"""The plan against what is really built: memory of small runs, parameters of the 671B ranks."""

import json
from pathlib import Path

import pytest
from plan_allocation import config
from ranks import run_ranks, run_script
from small_models import DEEPSEEK

from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import CRITIC, PERSISTENT_KINDS, rank_memory

pytestmark = pytest.mark.more

ROOT = Path(__file__).parents[2]

# Large enough that Megatron's padding and unsharded remainders are small, as in a real run.
MODEL = {
    **DEEPSEEK,
    "vocab_size": 1021,
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize(
    "world_size, grids",
    [
        pytest.param(
            *(1, ["one_float32", "one_bfloat16", "one_mtp_bfloat16", "ppo_bfloat16"]),
            marks=pytest.mark.slow,
        ),
        (
            2,
            [
                "dp_bfloat16",
                "tp2_bfloat16",
                "pp2_float32",
                "ep2_bfloat16",
                "pp2vp2_bfloat16",
                "ppo_tp2_bfloat16",
                "ppo_ep2_bfloat16",
            ],
        ),
    ],
)
def test_persistent_memory_is_within_five_percent_of_the_plan(tmp_path, world_size, grids):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    script = "plan_allocation.py"
    run_ranks(Path(__file__).parent, world_size, script, str(tmp_path), str(tmp_path), *grids)
    for grid in grids:
        job = PlannedJob(MODEL, config(str(tmp_path), grid), world_size, HARDWARE["H800"])
        planned = rank_memory(job)
        for rank in range(world_size):
            measured = json.loads((tmp_path / f"{grid}_{rank}.json").read_text())
            plan = planned[measured["pipeline_rank"]].training
            for kind in (*PERSISTENT_KINDS, CRITIC) if "ppo" in grid else PERSISTENT_KINDS:
                assert plan[kind] == pytest.approx(measured[kind], rel=0.05), (grid, rank, kind)


def build(*pipeline_ranks: int) -> str:
    """What building these stages of the 2,048-GPU recipe on the meta device reports."""
    chosen = f"[{', '.join(map(str, pipeline_ranks))}]" if pipeline_ranks else "None"
    code = (
        "from megatron_r1 import config\n"
        "from megatron_r1.models import read_hf_config\n"
        "from megatron_r1.plan.build import build_ranks\n"
        "from megatron_r1.plan.hardware import HARDWARE\n"
        "from megatron_r1.plan.job import PlannedJob\n"
        "settings = config.load_recipe('examples/deepseek_r1/r1_zero.yaml')\n"
        "hf_config = read_hf_config(settings.model.path)\n"
        f"print(build_ranks(PlannedJob(hf_config, settings, 2048, HARDWARE['H800']), {chosen}))"
    )
    return run_script(ROOT, ["-c", code])


def test_ranks_of_the_671b_layout_are_what_the_plan_and_the_weight_table_say():
    # The first stage has the embedding and a dense layer, the last MTP and head.
    assert "256 ranks (16 different) equal the weight table" in build(0, 15)


@pytest.mark.slow
def test_all_2048_ranks_together_hold_the_model_once():
    # 671,026,419,200 values and 11,610,068,224 of the MTP layer.
    output = build()
    assert "2,048 ranks (128 different)" in output
    assert "together they own 682,636,487,424 values" in output
