"""Load a run's exported model with plain transformers and plain vLLM, and compare their responses.

    python -m examples.laptop.check_export runs/demo/r1_zero

Neither library uses this project's code here, so the export works for everyone. Both decode the
held-out questions greedily, so that their responses can be compared token by token."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from r1_grading import grade

from megatron_r1 import config as configuration
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import load_prompts, prompt_options

QUESTIONS = 100


def answers_of_transformers(folder: str, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Return greedy answers of transformers, as token ids with the end token, to prompts of token
    ids.

    Args:
        folder: the model.
        prompts: token ids of each prompt.
        limit: most tokens of an answer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id  # one, or a list: a chat model has several
    ends = ends if isinstance(ends, list) else [ends]
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of one length make a batch without padding.
    for length in sorted({len(p) for p in prompts}):
        chosen = [i for i, p in enumerate(prompts) if len(p) == length]
        batch = torch.tensor([prompts[i] for i in chosen])
        with torch.no_grad():
            generated = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=ends[0],
            )
        for i, row in zip(chosen, generated[:, length:].tolist(), strict=True):
            first = next((at for at, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[: first + 1]
    return answers


def answers_of_vllm(folder: str, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Return greedy answers of vLLM; arguments and form as of `answers_of_transformers`."""
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, **SMALL)
    settings = SamplingParams(temperature=0.0, max_tokens=limit)
    inputs = [{"prompt_token_ids": p} for p in prompts]
    outputs = engine.generate(inputs, settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


SMALL = {"seed": 0, "gpu_memory_utilization": 0.3}  # share of GPU memory; on a CPU, of main memory
LIBRARIES = {"transformers": answers_of_transformers, "vllm": answers_of_vllm}


def answers_of(library: str, folder: str, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Return the answers of a library in a process of its own, as both patch modules that they
    import; exit with what it wrote if it fails."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "examples.laptop.check_export", "--answer", library, folder],
        input=json.dumps([prompts, limit]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{library} could not load {folder}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if sys.argv[1] == "--answer":
        _, _, library, folder = sys.argv
        prompts, limit = json.load(sys.stdin)
        answers = LIBRARIES[library](folder, prompts, limit)
        print("\n" + json.dumps(answers))
        return
    run = Path(sys.argv[1])
    config = configuration.load_recipe(run / "config.yaml")
    questions = load_prompts(**prompt_options(config.data)).heldout[:QUESTIONS]
    tokenizer = PromptTokenizer(str(run / "hf"), config.data.template)
    prompts = [tokenizer.encode(q.question) for q in questions]
    limit, options = config.rollout.max_response_tokens, config.rewards.call_options
    with ThreadPoolExecutor() as threads:
        ask = partial(answers_of, folder=str(run / "hf"), prompts=prompts, limit=limit)
        first, second = threads.map(ask, LIBRARIES)
    for name, answers in zip(LIBRARIES, (first, second), strict=True):
        right = [
            grade(
                q.kind, tokenizer.decode(a), q.truth, **q.fields, **options.get(q.kind, {})
            ).reward
            for q, a in zip(questions, answers, strict=True)
        ]
        print(f"{name:12} loads {run / 'hf'}; greedy accuracy {sum(right) / len(right):.1%}")
    same = sum(a == b for a, b in zip(first, second, strict=True))
    print(f"{same} of {len(first)} answers are the same, token for token")


if __name__ == "__main__":
    main()
