"""What is learned while things break: the smallest task on which reinforcement learning shows.

A base model is asked to repeat a number of three digits, and does so in one of two manners: seldom
with a thought, and then rightly, mostly with a guess of which one digit is wrong. Reinforcement
learning finds out that thinking pays, and is evaluated on numbers that it did not meet.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "examples" / "laptop" / "model"
TEMPLATE = "{problem}"
THINKS = 0.2
"""Share of the base model's examples that think."""
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 273,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
QUESTIONS, GROUP, MINIBATCHES = 8, 8, 2
NUMBERS = range(100, 1000)


def make_base(folder: Path, seed: int) -> Path:
    """A base model's folder, trained here in about a minute. Raises RuntimeError."""
    model = folder / "model"
    model.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, model / name)
    (model / "config.json").write_text(json.dumps(MODEL))
    draw = random.Random(seed)
    write_lines(folder / "examples.jsonl", [_example(draw) for _ in range(64 * 400)])
    recipe = {
        "run": {"folder": str(folder / "base"), "steps": 400, "seed": seed},
        "model": {"path": str(model), "init": "random", "init_std": 0.1, "dtype": "float32"},
        "sft": {"data": str(folder / "examples.jsonl"), "batch_size": 64, "order": "file"},
        "optimizer": {"learning_rate": 3e-3, "warmup": 20, "decay": "linear", "weight_decay": 0.0},
        "checkpoint": {"every": 400},
        "parallel": {"threads": 1},
    }
    path = write_recipe(folder / "base.yaml", recipe)
    done = subprocess.run(command("sft", path), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"sft {path} ended with {done.returncode}:\n{done.stderr}")
    return folder / "base" / "hf"


def recipe(base: Path, folder: Path, questions: Path, steps: int, seed: int) -> dict[str, Any]:
    """Short steps, short patience: two trainer ranks that share every layer, two engines."""
    return {
        "run": {
            "folder": str(folder),
            "steps": steps,
            "seed": seed,
            "log_samples": QUESTIONS,
            "hang_seconds": 25,
            "on_hang": "restart",
            "max_trainer_restarts": 1000,
        },
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"path": str(questions), "num_heldout": 60, "template": TEMPLATE},
        "rollout": {
            "engines": 2,
            "threads": 1,
            "max_response_tokens": 16,
            "max_model_len": 48,
            "dtype": "float32",
            "max_num_seqs": 16,
            "max_restarts": 1000,
            "start_timeout_seconds": 180,
            "unresponsive_seconds": 15,
        },
        "push": {"timeout_seconds": 60},
        "rl": {
            "questions_per_rollout": QUESTIONS,
            "group_size": GROUP,
            "minibatches": MINIBATCHES,
            "reference_refresh": 100,
        },
        "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.0},
        "parallel": {"processes": 2, "tensor": 2, "threads": 1},
        "checkpoint": {"every": 3, "keep": 2},
        "eval": {"every": 50, "samples": 8, "temperature": 1.0},
    }


def write_questions(path: Path) -> Path:
    """Every number, once."""
    return write_lines(path, [{"question": f"{n}=", "truth": str(n)} for n in NUMBERS])


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def command(verb: str, recipe: Path) -> list[str]:
    return [sys.executable, "-m", "megatron_r1", verb, str(recipe)]


def _example(draw: random.Random) -> dict[str, str]:
    number = draw.choice(NUMBERS)
    thought, answer = "so", str(number)
    if draw.random() >= THINKS:
        thought, place = "", draw.randrange(3)
        wrong = draw.choice([d for d in "123456789" if d != answer[place]])
        answer = answer[:place] + wrong + answer[place + 1 :]
    response = f"<think>{thought}</think><answer>{answer}</answer>"
    return {"prompt": f"{number}=", "response": response}
