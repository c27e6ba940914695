"""Command lines with a mistake: each is refused before anything starts, by its key and cause."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from refusals import refused
from safetensors.numpy import save_file
from small_qwen2 import MODEL

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.commands.init import verb as init
from megatron_r1.commands.parts.node_resources import NodeResources

LAPTOP = Path(__file__).parents[3] / "examples/laptop/model"
CASES = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that refused.yaml describes, on a node without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "detect_node_resources", lambda: NodeResources(0, 16 * 2**30))
    shutil.copytree(LAPTOP, "model")
    vocabulary = len(json.loads(Path("model/tokenizer.json").read_text())["model"]["vocab"]) + 8
    settings = MODEL | {"vocab_size": vocabulary, "max_position_embeddings": 128}
    Path("model/config.json").write_text(json.dumps(settings))
    save_file({}, "model/model.safetensors")
    Path("r.yaml").write_text("run: {folder: runs/x}\nmodel: {path: m}\n")
    Path("wrong.yaml").write_text("rl: {groupsize: 4}\n")
    Path("tab.yaml").write_text("run:\n\tfolder: x\n")
    Path("text.yaml").write_text("run: x\n")
    Path("in.jsonl").write_text("{}\n")
    Path("empty.jsonl").touch()
    with Path("sums.csv").open("w", newline="") as file:
        sums = [(f"{a} + {b}", a + b) for a in range(2, 6) for b in range(3, 8)]
        csv.writer(file).writerows([("Math task", "The result"), *sums])
    Path("run").mkdir()
    monkeypatch.setattr(
        "megatron_r1.commands.parts.trained_model.complete_checkpoints",
        lambda folder: [folder / "step_1"] if folder.parent.name == "run" else [],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["arguments"]))
def test_a_wrong_command_line_is_refused(here, case):
    with refused(case["key"], Cause(case["cause"]), *case.get("shows", ())):
        cli._dispatch_command(case["arguments"])
    assert not Path("out.jsonl").exists()
