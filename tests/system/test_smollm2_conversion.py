"""The model of `make demo-pretrained`, where it has been fetched: converted as gguf reads it, and
the chain of stages in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, run

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / "build/smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FETCHED / "packages/gguf").exists(),
        reason="make smollm2",
    ),
]

# Run where the GGUF packages are on the path.
COMPARE = """
import json, sys
import numpy as np, torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from examples.smollm2.convert import FILE, gguf_folder

stored = load_file(sys.argv[1] + "/model.safetensors")
names = {"token_embd.weight": "model.embed_tokens.weight"}
names["output_norm.weight"] = "model.norm.weight"
parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj"}
for layer in range(30):
    for ours, theirs in parts.items():
        names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
read = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(gguf_folder() / FILE).tensors}
different = []
for name, values in read.items():
    found = stored.pop(names[name]).numpy()
    if "attn_q" in name or "attn_k" in name:
        # GGUF stores the rows of a head as pairs that rotate together: row 2i and 2i + 1 of ours
        # are i and i + 32.
        values = values.reshape(-1, 32, 2, values.shape[1]).swapaxes(1, 2).reshape(found.shape)
    if not np.array_equal(found, values.reshape(found.shape)):
        different.append(name)
print(json.dumps([len(read), different, sorted(stored)]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    with_packages(["-m", "examples.smollm2.convert", str(folder)])
    return folder


def with_packages(arguments: list[str]) -> str:
    path = f"{FETCHED / 'packages'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_tensor_is_what_gguf_itself_reads(model):
    count, different, left = json.loads(with_packages(["-c", COMPARE, str(model)]).splitlines()[-1])
    assert (count, different, left) == (272, [], [])


def test_it_answers_in_its_chat_template(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        out = policy.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert tokenizer.encode("12 + 345") == [33, 34, 1232, 216, 35, 36, 37]  # a token a digit


def test_the_chain_runs_in_miniature(model, tmp_path):
    settings = {
        "examples.model": model,
        **{f"{name}.run.steps": 2 for name in ("sft", "student")},
        **{f"{name}.sft.epochs": "null" for name in ("sft", "student")},
        **{f"{name}.sft.batch_size": 4 for name in ("sft", "student")},
        "rl.run.steps": 2,
        "rl.data.num_heldout": 4,
        "rl.rl.prompts_per_rollout": 4,
        "rl.rl.group_size": 4,
        "answers.data.num_train": 8,
        "answers.sample.keep.min_accuracy": 0,
        **{f"{name}.eval.samples": 2 for name in ("rl", "before", "scores")},
        **{f"{name}.model.path": model for name in ("sft", "student", "before")},
    }
    options = [f"--stages.{key}={value}" for key, value in settings.items()]
    folder = tmp_path / "chain"
    done = run(
        "pipeline",
        "examples/smollm2/chain.yaml",
        f"--pipeline.folder={folder}",
        *options,
        more={"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("rl/hf/model.safetensors", "student/hf/model.safetensors", "scores/eval.json"):
        assert (folder / name).exists(), name
