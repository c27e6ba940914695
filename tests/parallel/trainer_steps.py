"""GRPO updates of the real trainer on these ranks: `trainer_steps.py MODEL OUT GRID…`.

Every grid sees the same mini-batches, spread as the controller spreads them: two updates, the
weights (OUT/GRID.safetensors), a checkpoint, and the first update of the next rollout. That one is
made once more by a fresh trainer from the checkpoint of the grid before. All metrics go to
OUT/GRID.json."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings

from megatron_r1.config import Config
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

TEMPERATURE = 0.8
SETTINGS = LossSettings(
    loss_average="sequence",
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    importance_cap=2.0,
    kl_beta=0.1,
    entropy_coef=0.01,
)
LOSS = "megatron_r1.controller.algorithms.grpo:loss"


def samples(seed: int) -> list[Sample]:
    draw = random.Random(seed)
    made = []
    for _ in range(12):
        prompt = [draw.randrange(67) for _ in range(draw.randrange(1, 6))]
        response = [draw.randrange(67) for _ in range(draw.randrange(1, 30))]
        logprobs = [-draw.uniform(3, 6) for _ in response]
        made.append(Sample.pack(prompt, response, logprobs, draw.uniform(-2, 2)))
    return made


def config(model: str, grid: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            # A large epsilon makes Adam's step smooth in the gradient, where tiny differences of
            # tiny gradients would else decide its sign.
            "optimizer": {"learning_rate": 0.1, "epsilon": 1.0, "weight_decay": 0.01},
            "parallel": {
                **parallel_settings(grid),
                "tokens_per_microbatch": 80,
                "threads": 1,
            },
        }
    )


def load(trainer, grid_position, seeds, first_old=True) -> None:
    steps = []
    for seed in seeds:
        made = samples(seed)
        plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
            grid_position.data_rank
        ]
        steps.append([[made[i] for i in members] for members in plan])
    trainer.load(steps)
    trainer.compute_logprobs(TEMPERATURE, with_reference=True, with_first_minibatch=first_old)


def update(trainer, minibatch_index) -> dict:
    settings = replace(SETTINGS, ratio_level=("token", "sequence")[minibatch_index])
    return trainer.update(minibatch_index, LOSS, settings, 0.1, TEMPERATURE)


def main() -> None:
    model, out, *grids = sys.argv[1:]
    out = Path(out)
    previous = out / "checkpoint"
    for grid in grids:
        settings = config(model, grid)
        grid_position = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.checkpoint_manager import CheckpointManager
        from megatron_r1.trainer.trainer import Trainer

        trainer = Trainer(settings, grid_position)
        folders = CheckpointManager(trainer)
        trainer.refresh_reference()
        load(trainer, grid_position, (1, 2))
        report = {"score": trainer.measure_logprob_diff()}
        report |= {"first": update(trainer, 0), "second": update(trainer, 1)}
        weights.write_hf(
            trainer.model_chunks,
            trainer.hf_config,
            out / f"{grid}.safetensors",
            dtype=torch.float32,
        )
        folders.save_checkpoint(str(out / f"checkpoint_{grid}"), {"grid": grid})
        # Trains on while it is written: that must not be in the checkpoint.
        load(trainer, grid_position, (3,))
        report["next rollout"] = update(trainer, 0) | trainer.measure_logprob_diff()
        assert folders.checkpoint_progress(wait=True)["error"] is None
        if previous.exists():
            other = Trainer(settings, grid_position)
            CheckpointManager(other).load_checkpoint(str(previous), with_reference=True)
            # Old log-probabilities by the update itself: nothing may differ.
            load(other, grid_position, (3,), first_old=False)
            report["continued"] = update(other, 0) | other.measure_logprob_diff()
        is_first_context = parallel_state.get_context_parallel_rank() == 0
        if (
            grid_position.is_last_stage
            and grid_position.data_rank == grid_position.tensor_rank == 0
            and is_first_context
        ):
            (out / f"{grid}.json").write_text(json.dumps(report))
        dist.barrier()
        previous = out / f"checkpoint_{grid}"
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
