"""RL that starts from an FP8 folder, as DeepSeek publishes them: the trainer reads the scales, and
the engine must not expect quantized weights from the pushes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, run

ROOT = Path(__file__).parents[2]


@pytest.mark.more
def test_rl_starts_from_an_fp8_folder_and_trainer_and_engine_agree(base, tmp_path):
    folder = tmp_path / "fp8"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert", "to-hf", base / "base", folder]
        + ["--dtype", "fp8", "--no-check"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    settings = ["--model.path", folder, "--run.folder", tmp_path / "run", "--run.steps", 1]
    done = run("rl", base / "rl.yaml", *map(str, settings))
    assert done.returncode == 0, done.stderr + done.stdout
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["logprob_diff/max"] < 1e-4, "fp32 on both sides"
    exported = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert "quantization_config" not in exported
