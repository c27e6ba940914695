"""One training run in a process of its own: `python -m tools.bench.fp8.worker TASK`, which prints
its report as its last line; both are JSON.

It uses the real trainer (Megatron's model, optimizer and schedule) on one rank, with SFT's loss."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_r1.base.processes.children import rank_variables
from megatron_r1.config import parse_recipe
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample
from tools.bench.fp8.losses import BASELINE, MODEL, WARMUP_STEPS, Language, variant_settings

LOSS = "megatron_r1.trainer.losses:supervised_loss"


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ |= rank_variables(0, 1, port=0)
    grid_position = distributed.initialize(
        parse_recipe(_task_settings(task)).parallel, seed=task["seed"]
    )
    print("\n" + json.dumps(_train_variant(task, grid_position)))


def _task_settings(task: dict[str, Any], **model: Any) -> dict[str, Any]:
    tree = variant_settings(task["variant"], task["model"], task["seed"], task["threads"])
    tree["model"] |= model
    return tree


def _train_variant(task: dict[str, Any], grid_position: Any) -> dict[str, Any]:
    # Megatron, which these import, needs the platform that `initialize` prepares.
    from megatron_r1.models import weights
    from megatron_r1.trainer.trainer import Trainer

    language = Language(MODEL["vocab_size"], task["seed"])
    config = parse_recipe(_task_settings(task))
    trainer = Trainer(config, grid_position)
    losses, start = [], time.perf_counter()
    for step in range(task["steps"]):
        _load_sentences(trainer, language.batch(f"{task['seed']} {step}", task["sentences"]))
        rate = config.optimizer.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        losses.append(round(trainer.update(0, LOSS, None, rate)["loss"], 5))
        print(f"{step + 1} {losses[-1]:.4f}", flush=True)
    seconds = time.perf_counter() - start
    heldout = language.batch(f"{task['seed']} held out", 4 * task["sentences"])
    logprobs = _token_logprobs(trainer, heldout)
    report = {
        "losses": losses,
        "heldout_loss": -logprobs.mean().item(),
        "seconds_per_step": seconds / task["steps"],
    }
    folder = Path(task["model"]).with_name(f"trained_{os.getpid()}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    weights.write_hf(
        trainer.model_chunks, trainer.hf_config, folder / "model.safetensors", dtype=torch.bfloat16
    )
    # An engine computes in bf16 with the pushed weights; the gap is the trainer's distance from it.
    engine_settings = _task_settings({**task, "variant": BASELINE}, init="load", path=str(folder))
    gap = (
        _token_logprobs(Trainer(parse_recipe(engine_settings), grid_position), heldout) - logprobs
    ).abs()
    return report | {"logprob_diff": {"mean": gap.mean().item(), "max": gap.max().item()}}


def _load_sentences(trainer: Any, sentences: list[list[int]]) -> None:
    samples = [Sample.pack(tokens[:2], tokens[2:]) for tokens in sentences]
    limit = trainer.config.parallel.microbatch_tokens
    plan = pack_samples([len(s) for s in samples], 1, limit).shares[0]
    trainer.load([[[samples[i] for i in members] for members in plan]])


def _token_logprobs(trainer: Any, sentences: list[list[int]]) -> Any:
    """Return every predicted token's fp32 log-probability, in an order fixed by `sentences`."""
    _load_sentences(trainer, sentences)
    trainer.compute_logprobs(temperature=1.0, with_reference=False)
    batches = trainer.rollout.minibatches[0]
    return torch.cat([batch.logprobs["old"][batch.is_response] for batch in batches])


if __name__ == "__main__":
    main()
