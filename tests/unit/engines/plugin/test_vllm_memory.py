"""What vLLM says of the memory of its passes, and the plan's table of it."""

import json
from argparse import ArgumentTypeError
from pathlib import Path
from random import Random

import pytest
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import get_kwargs

from megatron_r1.base.errors import UserError
from megatron_r1.config import load_recipe
from megatron_r1.engines.server.vllm_arguments import argument_list, compilation_config
from megatron_r1.models import read_hf_config
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import pass_memory, vllm_table
from tools.ask_vllm import BACKENDS, DEEP_GEMM_ROWS, ask_vllm, expert_shapes, workspace_bytes

V3 = (7168, 2048, 8)
R1 = Path(__file__).parents[4] / "examples/deepseek_r1"


def test_the_table_is_what_the_installed_vllm_answers():
    """`python tools/ask_vllm.py` writes it again."""
    answer = ask_vllm(expert_shapes([]), {})
    assert json.loads(json.dumps(answer)) == vllm_table()
    assert "7168 x 2048 x 8" in answer["expert workspace"]


def test_experts_take_two_buffers_of_every_tokens_choices():
    """As counted by hand: 16 data ranks x 8,192 tokens x 8 experts of 7,168 values in bf16."""
    assert workspace_bytes("TRITON", V3, 131_072, 3) == 2 * (131_072 * 8 * 7168 * 2) == 28 << 30


def test_experts_asked_for_earlier_stay_while_the_version_is_the_same():
    table = vllm_table()
    assert ask_vllm([], table)["expert workspace"] == table["expert workspace"]
    more = ask_vllm([(192, 7, 2)], table)["expert workspace"]
    assert more.keys() - table["expert workspace"] == {"192 x 7 x 2"}
    assert ask_vllm([], table | {"vllm": "0.31.0"})["expert workspace"] == {}


@pytest.mark.parametrize(
    "value",
    [
        *({"cudagraph_mode": mode} for mode in ("none", "NONE", "Full", 0, 1, None)),
        '{"cudagraph_mode": "none"}',
        "{}",
        "none",
        3,
        None,
    ],
    ids=repr,
)
def test_a_compilation_config_is_read_as_vllm_s_parser_reads_it(value):
    arguments = {"compilation_config": value}
    _, word = argument_list(arguments)
    parse = get_kwargs(VllmConfig)["compilation_config"]["type"]
    try:
        accepted = parse(word)
    except ArgumentTypeError:
        with pytest.raises(UserError, match="rollout.vllm.compilation_config="):
            compilation_config(arguments)
        return
    config = load_recipe(R1 / "r1_zero.yaml", {"rollout.vllm": arguments})
    job = PlannedJob(read_hf_config(R1 / "model"), config, 2048, HARDWARE["H800"])
    graphs = pass_memory(job, 512).get("CUDA graphs")
    mode = accepted.cudagraph_mode or CUDAGraphMode.FULL_AND_PIECEWISE
    if accepted.cudagraph_mode is CUDAGraphMode.NONE:
        assert graphs is None
    else:
        kinds = 1 + mode.separate_routine()
        assert graphs.number == 35 * kinds * (16 << 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_workspace_is_on_the_line_of_the_table(backend):
    """At any number of tokens, but for the rows to which DeepGEMM aligns."""
    random = Random(0)
    for shape in (V3, (2048, 768, 8), (2048, 96, 8)):
        name = " x ".join(map(str, shape))
        per_token, per_expert, rest = vllm_table()["expert workspace"][name][backend]
        rounding = (DEEP_GEMM_ROWS * per_token // shape[2] if backend == "DEEPGEMM" else 0) + 512
        for _ in range(40):
            tokens, experts = random.randint(256, 150_000), random.randint(1, 64)
            asked = workspace_bytes(backend, shape, tokens, experts)
            assert asked <= per_token * tokens + per_expert * experts + rest <= asked + rounding
