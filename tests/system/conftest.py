"""A base model for runs of the command line, an event loop for fleets, and transformers in a
process of its own."""

import asyncio
import concurrent.futures
import json
import multiprocessing
from pathlib import Path

import pytest
from command_line import run, write_model
from lookup_base import write_base


@pytest.fixture(scope="module")
def loop():
    """A function that runs a coroutine; all of a module's run in one event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


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
data: {{path: {folder}/questions.jsonl, num_heldout: 4, template: "{{question}}"}}
rollout: {{max_response_tokens: 24, dtype: float32, max_num_seqs: 64}}
rl:
  prompts_per_rollout: 4
  group_size: 4
  minibatches: 2
  reference_refresh: 0
  schedule: [{{from_step: 3, rollout.max_response_tokens: 12, optimizer.learning_rate: 1.0e-4}}]
optimizer: {{learning_rate: 3.0e-4}}
eval: {{samples: 4}}
rewards:
  weights: {{accuracy: 1.0, format: 0.1, conciseness: {{weight: 0.0, from_step: 2}}}}
  options: {{conciseness: {{free_length: 0, max_length: 48}}}}
"""
    )
    done = run("sft", folder / "sft.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def lookup_base(tmp_path_factory) -> Path:
    """A folder with the rows of examples/agents, and a base model that knows the form of a call."""
    folder = tmp_path_factory.mktemp("lookup")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def oracle():
    """Runs functions of tiny_models.py in a process of its own, without transformers in this."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
