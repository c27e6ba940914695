"""`megatron-r1 check-model` with real ranks and a real engine."""

import json
import shutil
import subprocess

import command_line
import pytest
import tiny_models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name, layout",
    [
        ("QWEN3_MOE", ("--parallel.tensor", "2", "--parallel.expert", "2")),
        ("GLM_LITE", ("--parallel.pipeline", "2", "--parallel.pipeline_layout", "Ett|tL")),
    ],
)
def test_transformers_megatron_and_vllm_agree(oracle, tmp_path, name, layout):
    model = tmp_path / "model"
    config = {**getattr(tiny_models, name), "vocab_size": 280}
    oracle(tiny_models.write_model, model, config, 0)
    oracle(command_line.write_model, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        shutil.copy(file, model)
    done = subprocess.run(
        command_line.command("check-model", model, *layout, "--json", tmp_path / "found.json"),
        env=command_line.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["agree"] and found["compared"] > 100 and found["tokens"] == 263, done.stdout
    assert 0 < found["megatron"] < 1e-4 and 0 < found["vllm"] < 1e-4, done.stdout
    print(done.stdout)
