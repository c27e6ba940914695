"""Greedy continuations: `greedy.py trainer CONFIG CHECKPOINT | transformers HF | vllm HF`.

Prints a JSON list of lists of LENGTH tokens; an end token does not end them.
"""

import json
import sys

# So many that not all of them have one answer, although a model may repeat one token after several.
PROMPTS = [
    *([0, 22, 13, 24], [0, 40], [0, 5, 6, 7, 8, 9, 10, 11], [0, 100, 200, 50]),
    *([0, 253, 61], [0, 18, 13, 18, 31], [0, 150], [0, 7, 7, 7, 240, 90]),
]
LENGTH = 8
SMALL = {"gpu_memory_utilization": 0.3}  # of memory, which others use too


def by_trainer(config_path: str, checkpoint: str) -> list[list[int]]:
    import os

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_r1 import config, models
    from megatron_r1.trainer import distributed

    settings = config.load_recipe(config_path)
    place = distributed.initialize(settings.parallel, 0)
    import torch

    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(settings, place)
    CheckpointManager(trainer).load_checkpoint(checkpoint, with_reference=True)
    model = trainer.model_chunks[0].eval()
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(LENGTH):
            with torch.no_grad():
                hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
                tokens.append(int(models.compute_logits(model, hidden)[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def by_transformers(folder: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=2,
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def by_vllm(folder: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, **SMALL)
    settings = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    asked = [{"prompt_token_ids": p} for p in PROMPTS]
    return [list(r.outputs[0].token_ids) for r in engine.generate(asked, settings, use_tqdm=False)]


if __name__ == "__main__":
    tool, *arguments = sys.argv[1:]
    answer = {"trainer": by_trainer, "transformers": by_transformers, "vllm": by_vllm}[tool]
    print("\n" + json.dumps(answer(*arguments)))
