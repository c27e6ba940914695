"""The experts' exchange behind the computation of another micro-batch: Megatron's combined schedule
against its plain one."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from small_models import DEEPSEEK, QWEN3_MOE

HERE = Path(__file__).parent
ONE_EXPERT = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
MODELS = {
    "deepseek": DEEPSEEK,
    "deepseek-mtp": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    # Of which FP8 products have whole tiles.
    "even-sizes": {**DEEPSEEK, "q_lora_rank": 32, "kv_lora_rank": 48, "moe_intermediate_size": 32},
    "one-expert": {**DEEPSEEK, **ONE_EXPERT},
    "dense-end": {**QWEN3_MOE, "mlp_only_layers": [1, 3]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Configurations of MODELS; the trainer makes their weights."""
    made = tmp_path_factory.mktemp("exchange")
    for name, hf_config in MODELS.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(hf_config))
    return made


MORE = pytest.mark.more


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (2, ["ep2+plain,one-expert,mtp"]),
        pytest.param(2, ["ep2+bf16,selective,core_attn,replay,prompts"], marks=pytest.mark.slow),
        pytest.param(2, ["ep2+lora,fp8,dense-end,score"], marks=pytest.mark.slow),
        pytest.param(2, ["cp2xep2+selective,replay", "tp2xep2+plain,selective"], marks=MORE),
        pytest.param(
            4,
            ["pp2xvp2xep2+plain,mtp,selective,replay,bf16", "pp2xunevenxep2+mtp,plain"],
            marks=MORE,
        ),
    ],
)
def test_losses_and_gradients_are_those_without_the_overlap(folder, world_size, grids):
    output = run_ranks(HERE, world_size, "exchange_steps.py", str(folder), *grids)
    for grid in grids:
        name, _, cases = grid.partition("+")
        for case in cases.split(","):
            assert f"{name} {case} holds" in output, output[-3000:]


@MORE
def test_no_stream_uses_what_another_still_writes(folder):
    """For every timing that a GPU could have; where no stream waits, the check finds races."""
    cases = ["plain", "selective", "replay"]
    output = run_ranks(HERE, 2, "exchange_streams.py", str(folder), "ep2", *cases)
    assert [f"{case} is in order" in output for case in cases] == [True] * 3, output[-3000:]
    assert "without waiting" in output
