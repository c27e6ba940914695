"""TRL's GRPOTrainer on the same work, in a process of its own.

`python -m tools.bench.step.peer_trl WORK MODEL QUESTIONS STEPS`, or several processes of it under
torchrun, prints one line of JSON per step but the first. All responses of a process are one batch
of transformers' generate (TRL 1.16 supports vLLM up to 0.31 only), an update is one forward and
backward pass (smaller micro-batches were no faster; `peer_microbatch` is for work that does not
fit), and nothing is logged, saved or recomputed. With one update per rollout, TRL takes the old
log-probabilities from the update itself, as megatron-r1 does."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tools.bench.step.work import StepWork, reward


class StepTimes(TrainerCallback):
    """Collects wall-clock and processor time at the end of each optimizer step."""

    def __init__(self):
        self.marks: list[np.ndarray] = []

    def on_step_end(self, args, state, control, **context):
        """Note both clocks.

        Args:
            args: not used, as all that transformers passes.
            state: not used.
            control: not used.
            **context: not used."""
        self.marks.append(np.array([time.perf_counter(), time.process_time()]))


def main() -> None:
    settings, model, questions, number = sys.argv[1:]
    work, steps = StepWork(**json.loads(settings)), int(number)
    lengths: list[int] = []

    def count_and_reward(completions: Any, completion_ids: Any, **_: object) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [reward(text) for text in completions]

    rows = [json.loads(line)["question"] for line in Path(questions).read_text().splitlines()]
    clock = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=count_and_reward,
            args=_training_arguments(work, folder, steps + 1),
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        )
        trainer.train()
    ends = clock.marks[work.minibatches - 1 :: work.minibatches]
    own_arguments = [
        [*(end - start), tokens]
        for start, end, tokens in zip(ends[:-1], ends[1:], lengths[1:], strict=True)
    ]
    measured = torch.tensor(own_arguments, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(measured)
        measured[:, 0] /= dist.get_world_size()
        if dist.get_rank():
            return
    for line in measured.tolist():
        print(
            json.dumps(dict(zip(("seconds", "core_seconds", "response_tokens"), line, strict=True)))
        )


def _training_arguments(work: StepWork, folder: str, rollouts: int) -> GRPOConfig:
    own_responses = work.num_responses // int(os.environ.get("WORLD_SIZE", "1"))
    update = own_responses // work.minibatches
    microbatch = work.peer_microbatch or update
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        max_steps=rollouts * work.minibatches,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=update // microbatch,
        steps_per_generation=own_responses // microbatch,
        num_generations=work.group,
        max_completion_length=work.limit,
        temperature=work.temperature,
        beta=work.kl_beta,
        epsilon=work.clip,
        loss_type="grpo",
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
