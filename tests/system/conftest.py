"""A small DeepSeek-V3-shaped model with a tokenizer, and a way to run the command line on it."""

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import DEEPSEEK

HERE = Path(__file__).parent
MODEL = DEEPSEEK | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "q_lora_rank": 48,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> None:
    """config.json and a byte-level tokenizer; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    whole.save_pretrained(folder)
    config = {**MODEL, "vocab_size": len(whole)}
    (folder / "config.json").write_text(json.dumps(config))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_r1", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def run(*arguments: str, timeout_seconds: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A folder with `base/hf`, a model made by a few steps of sft, and a recipe for it."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model")
    examples = [
        {"prompt": f"{a}+{b}=", "response": f"<think></think><answer>{a + b}</answer>"}
        for a in range(10)
        for b in range(10)
    ]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, examples)))
    questions = [
        {"question": f"{a}+{b}=", "truth": a + b, "kind": "grader:grade"}
        for a in range(10)
        for b in range(10)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "sft.yaml").write_text(
        f"""
run: {{folder: {folder}/base, steps: 4}}
model: {{path: {folder}/model, init: random, init_std: 0.1, dtype: float32}}
sft: {{data: {folder}/sft.jsonl, batch_size: 16}}
optimizer: {{learning_rate: 1.0e-3, weight_decay: 0.0}}
"""
    )
    (folder / "rl.yaml").write_text(
        f"""
run: {{folder: {folder}/rl, steps: 3}}
model: {{path: {folder}/base/hf, dtype: float32}}
data: {{path: {folder}/questions.jsonl, num_heldout: 4, template: "{{problem}}"}}
rollout: {{max_response_tokens: 24, dtype: float32, max_num_seqs: 64}}
rl: {{questions_per_rollout: 4, group_size: 4, minibatches: 2, reference_refresh: 0}}
optimizer: {{learning_rate: 3.0e-3}}
eval: {{samples: 4}}
rewards:
  weights: {{accuracy: 1.0, format: 0.1, conciseness: {{weight: 0.0, from_step: 2}}}}
  options: {{conciseness: {{free_length: 0, max_length: 48}}}}
"""
    )
    done = run("sft", folder / "sft.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def oracle():
    """Runs functions of tiny_models.py in a process of its own, without transformers in this."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
