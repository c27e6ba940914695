"""`megatron-r1 check-model` with real ranks and a real engine, on folders as the hub has them."""

import json
import subprocess
import time

import command_line
import miniatures
import pytest
from released_configs import RELEASED

pytestmark = pytest.mark.slow

TENSOR = ("--parallel.tensor", "2")
EXPERT = ("--parallel.expert", "2")
PIPELINE = ("--parallel.pipeline", "2")


@pytest.mark.parametrize(
    "name, layout",
    [
        *((name, ()) for name in RELEASED),
        *(("Qwen3-0.6B", layout) for layout in (TENSOR, PIPELINE)),
        *(("DeepSeek-V3.1", layout) for layout in (TENSOR, EXPERT, PIPELINE)),
        ("GLM-4.7-Flash", ("--parallel.pipeline", "2", "--parallel.pipeline_layout", "Ettt|tmL")),
        ("Qwen3-30B-A3B", (*TENSOR, *EXPERT)),
    ],
    ids=lambda given: (
        given if isinstance(given, str) else "".join(given).replace("--parallel.", "-")
    ),
)
def test_transformers_megatron_and_vllm_agree(oracle, tmp_path, name, layout):
    model = tmp_path / "model"
    oracle(miniatures.write, model, miniatures.shrink(RELEASED[name][0]))
    start = time.monotonic()
    done = subprocess.run(
        command_line.command("check-model", model, *layout, "--json", tmp_path / "found.json"),
        env=command_line.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    # transformers adds <|endoftext|> to a tokenizer of Qwen2.
    num_tokens = 264 if RELEASED[name][0]["architectures"] == ["Qwen2ForCausalLM"] else 263
    assert found["agree"] and found["compared"] > 100 and found["tokens"] == num_tokens, done.stdout
    assert 0 < found["megatron"] < 1e-4 and 0 < found["vllm"] < 1e-4, done.stdout
    print(
        f"\n| {name} | {found['architecture']} | {' '.join(layout) or 'one process'} "
        f"| {found['megatron']:.1e} | {found['vllm']:.1e} | {time.monotonic() - start:.0f} |"
    )
