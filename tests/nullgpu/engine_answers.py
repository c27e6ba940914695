"""vLLM's CUDA engine on a null GPU samples, and transformers on the CPU says how probable its
tokens are: `engine_answers.py engine|transformers FOLDER CASE`.

Each prints a line of JSON: for every prompt the log-probabilities of the sampled tokens. The
engine's process writes model and tokens to FOLDER."""

import json
import os
import sys
from pathlib import Path

import torch

PROMPTS = [[5, 6, 7, 8, 9], [100, 3, 4], list(range(20, 60))]
TOKENS = 6
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def answers(folder: Path, case: str) -> list[list[float]]:
    """Return what the engine says of the tokens that it samples."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from random_weights import write_random
    from vllm import LLM, SamplingParams
    from vllm_needs import CASES

    hf_config, _ = CASES[case]
    model = write_random(folder / "model", hf_config | SMALL, dtype=torch.bfloat16)
    sizes = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    engine = LLM(str(model), skip_tokenizer_init=True, gpu_memory_utilization=0.02, **sizes)
    sampling = SamplingParams(max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = [one.outputs[0] for one in engine.generate(prompts, sampling)]
    (folder / "tokens.json").write_text(json.dumps([list(one.token_ids) for one in found]))
    return [[next(iter(at.values())).logprob for at in one.logprobs] for one in found]


def expected(folder: Path) -> list[list[float]]:
    """Return what transformers says of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = json.loads((folder / "tokens.json").read_text())
    found = []
    for prompt, sampled in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(sampled)[:, None]
        found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist())
    return found


if __name__ == "__main__":
    role, place, *rest = sys.argv[1:]
    print(json.dumps(answers(Path(place), *rest) if role == "engine" else expected(Path(place))))
