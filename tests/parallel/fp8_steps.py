"""Supervised updates of the real trainer with emulated FP8:
`fp8_steps.py OUT NAME:RECIPE:DTYPE:GRID …`.

Each case trains from the same random weights on the same samples. OUT/NAME.json: losses, gradient
norms, which layers are emulated, what the trainer computes for the first batch before training;
OUT/NAME.safetensors: weights before, after one update and after all. A case called "saved" also
writes a checkpoint half-way, and "continued" goes on from it."""

import json
import random
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
STEPS = 6


def samples(seed: int) -> list[Sample]:
    """Counting up from a number in steps of another: something to learn."""
    draw = random.Random(seed)
    made = []
    for _ in range(16):
        first, step = draw.randrange(67), draw.randrange(1, 4)
        made.append(Sample.pack([first, step], [(first + step * i) % 67 for i in range(1, 16)]))
    return made


def settings(folder: str, recipe: str, dtype: str, grid: str, smooth: bool) -> Config:
    sizes = {k: int(n) for k, n in re.findall(r"([a-z]+)(\d+)", grid)}
    # A large epsilon makes Adam's step smooth in the gradient: for comparing layouts.
    optimizer = {"learning_rate": 0.1, "epsilon": 1.0} if smooth else {"learning_rate": 1e-3}
    return Config.model_validate(
        {
            "model": {
                "path": folder,
                "dtype": dtype,
                "init": "random",
                "init_std": 0.05,
                "mtp": "train",
            },
            "fp8": {"recipe": recipe},
            "optimizer": {**optimizer, "weight_decay": 0.0},
            "parallel": {
                "tensor": sizes.get("tp", 1),
                "pipeline": sizes.get("pp", 1),
                "expert": sizes.get("ep", 1),
                "tokens_per_microbatch": 256,
                "threads": 1,
            },
        }
    )


def load(trainer, grid_position, seed: int) -> None:
    made = samples(seed)
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 256).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])


def main() -> None:
    out, *cases = sys.argv[1:]
    out = Path(out)
    folder = out / "model"
    for case in cases:
        name, recipe, dtype, grid = case.split(":")
        config = settings(str(folder), recipe, dtype, grid, smooth=grid != "learn")
        grid_position = distributed.initialize(config.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.checkpoint_manager import CheckpointManager
        from megatron_r1.trainer.trainer import Trainer

        trainer = Trainer(config, grid_position)
        folders = CheckpointManager(trainer)
        emulated = [
            n for n, m in trainer.model_chunks[0].named_modules() if "_forward_impl" in vars(m)
        ]
        weights.write_hf(
            trainer.model_chunks,
            trainer.hf_config,
            out / f"{name}_before.safetensors",
            dtype=torch.float32,
        )
        report = {"loss": [], "grad_norm": [], "emulated": emulated}
        start = 0
        if name == "continued":
            folders.load_checkpoint(str(out / "checkpoint"), with_reference=False)
            start = STEPS // 2
        for step in range(start, STEPS):
            load(trainer, grid_position, step)
            metrics = trainer.update(0, LOSS, None, config.optimizer.learning_rate)
            for key in ("loss", "grad_norm"):
                report[key].append(metrics.get(key))
            if step == 0:
                weights.write_hf(
                    trainer.model_chunks,
                    trainer.hf_config,
                    out / f"{name}_one.safetensors",
                    dtype=torch.float32,
                )
            if name == "saved" and step == STEPS // 2 - 1:
                folders.save_checkpoint(str(out / "checkpoint"), {})
                folders.checkpoint_progress(wait=True)
        weights.write_hf(
            trainer.model_chunks,
            trainer.hf_config,
            out / f"{name}_all.safetensors",
            dtype=torch.float32,
        )
        if (
            grid_position.is_last_stage
            and grid_position.data_rank == 0
            and grid_position.tensor_rank == 0
        ):
            (out / f"{name}.json").write_text(json.dumps(report))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
