"""The task of the run: the smallest one on which reinforcement learning visibly learns.

A base model repeats a number of three digits. It seldom thinks first, and is then right; mostly it
guesses, with one digit wrong. Reinforcement learning discovers that thinking pays; evaluation uses
numbers it was not trained on.
"""

import json
import random
from pathlib import Path
from typing import Any

from tools.bench.children import megatron_r1, run_to_end, write_recipe
from tools.bench.small_models import qwen2, write_folder

TEMPLATE = "{problem}"
THINKS = 0.2
"""Share of the base model's examples with a thought."""
QUESTIONS, GROUP, MINIBATCHES = 8, 8, 2
NUMBERS = range(100, 1000)


def make_base(folder: Path, seed: int) -> Path:
    """Train a base model, in about a minute; return its folder."""
    model = write_folder(folder / "model", qwen2(64, 2, 2, max_position_embeddings=64))
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
    run_to_end(megatron_r1("sft", write_recipe(folder / "base.yaml", recipe)))
    return folder / "base" / "hf"


def recipe(base: Path, folder: Path, questions: Path, steps: int, seed: int) -> dict[str, Any]:
    """Return a recipe with short steps and timeouts, two tensor-parallel ranks and two engines."""
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
    """Write every number once."""
    return write_lines(path, [{"question": f"{n}=", "truth": str(n)} for n in NUMBERS])


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _example(draw: random.Random) -> dict[str, str]:
    number = draw.choice(NUMBERS)
    thought, answer = "so", str(number)
    if draw.random() >= THINKS:
        thought, place = "", draw.randrange(3)
        wrong = draw.choice([d for d in "123456789" if d != answer[place]])
        answer = answer[:place] + wrong + answer[place + 1 :]
    response = f"<think>{thought}</think><answer>{answer}</answer>"
    return {"prompt": f"{number}=", "response": response}
