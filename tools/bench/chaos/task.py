"""The task of the run: the smallest one on which reinforcement learning visibly learns.

A base model repeats a number of three digits. It seldom thinks first, and is then right; mostly it
guesses, with one digit wrong. Reinforcement learning discovers that thinking pays; evaluation uses
numbers it was not trained on."""

import random
from pathlib import Path

import yaml

from megatron_r1.base.files.jsonl import write_lines
from tools.bench.children import megatron_r1, run_to_end
from tools.bench.small_models import qwen2, write_folder

HERE = Path(__file__).parent
THINKS = 0.2
"""Share of the base model's examples with a thought."""
RL = yaml.safe_load((HERE / "run.yaml").read_text())["rl"]
QUESTIONS, MINIBATCHES = RL["questions_per_rollout"], RL["minibatches"]
NUMBERS = range(100, 1000)


def make_base(folder: Path, seed: int) -> Path:
    """Train a base model, in about a minute; return its folder."""
    model = write_folder(folder / "model", qwen2(64, 2, 2, max_position_embeddings=64))
    draw = random.Random(seed)
    write_lines(folder / "examples.jsonl", [_example(draw) for _ in range(64 * 400)])
    settings = {
        "run.folder": folder / "base",
        "run.seed": seed,
        "model.path": model,
        "sft.data": folder / "examples.jsonl",
    }
    run_to_end(megatron_r1("sft", HERE / "base.yaml", settings))
    return folder / "base" / "hf"


def command(
    base: Path, folder: Path, questions: Path, steps: int, seed: int, staleness: int
) -> list[str]:
    """Return the command of an RL run on `questions` that starts from the model `base`. staleness:
    `rl.staleness`; 0: the run is synchronous."""
    settings = {
        "run.folder": folder,
        "run.steps": steps,
        "run.seed": seed,
        "model.path": base,
        "data.path": questions,
    }
    if staleness:
        settings |= {"rl.staleness": staleness, "rl.importance_cap": 2.0}
    return megatron_r1("rl", HERE / "run.yaml", settings)


def write_questions(path: Path) -> Path:
    return write_lines(path, [{"question": f"{n}=", "truth": str(n)} for n in NUMBERS])


def _example(draw: random.Random) -> dict[str, str]:
    number = draw.choice(NUMBERS)
    thought, answer = "so", str(number)
    if draw.random() >= THINKS:
        thought, place = "", draw.randrange(3)
        wrong = draw.choice([d for d in "123456789" if d != answer[place]])
        answer = answer[:place] + wrong + answer[place + 1 :]
    response = f"<think>{thought}</think><answer>{answer}</answer>"
    return {"prompt": f"{number}=", "response": response}
