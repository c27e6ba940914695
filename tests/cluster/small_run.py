"""A model of a few thousand weights, questions and a recipe that several hosts train on."""

import json
import os
import subprocess
import sys
from pathlib import Path

MAKE_MODEL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from examples.laptop.make_tokenizer import make_tokenizer
import tiny_models
tokenizer, folder = make_tokenizer(), Path(sys.argv[1])
ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(tokenizer)}
tiny_models.write_model(folder, getattr(tiny_models, sys.argv[3]) | ids, seed=0)
tokenizer.save_pretrained(folder)
"""
ROOT = Path(__file__).parents[2]
# Several processes of several frameworks on few cores: none may spin while it waits.
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}


def environment() -> dict[str, str]:
    return os.environ | QUIET


def write_recipe(folder: Path, steps: int, shape: str = "QWEN") -> Path:
    """A model with random weights, questions, and the recipe's path; rl runs in `folder`/run.
    shape: one of tiny_models'."""
    subprocess.run(
        [sys.executable, "-c", MAKE_MODEL, folder / "model", ROOT / "tests" / "system", shape],
        check=True,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
    )
    questions = [{"question": f"{a} + {b} =", "truth": str(a + b)} for a, b in SUMS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    recipe = folder / "rl.yaml"
    recipe.write_text(
        f"""
run: {{folder: {folder}/run, steps: {steps}}}
model: {{path: {folder}/model, dtype: float32}}
data: {{path: {folder}/questions.jsonl, heldout_fraction: 0.0, template: "{{question}}"}}
rollout: {{max_response_tokens: 16, dtype: float32, max_num_seqs: 16, start_timeout_seconds: 240}}
rl: {{prompts_per_rollout: 2, group_size: 2, minibatches: 1, reference_refresh: 0}}
optimizer: {{learning_rate: 1.0e-4}}
rewards: {{workers: 1}}
parallel: {{threads: 1}}
"""
    )
    return recipe


SUMS = [(a, b) for a in range(5) for b in range(5)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
