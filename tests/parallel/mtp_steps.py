"""A GRPO update of the real trainer with each setting of model.mtp: `mtp_steps.py MODEL OUT GRID…`.

The samples are the oracle's sequences, all but their first token a response. Writes the weights
after the update to OUT/GRID-SETTING.safetensors and, with MTP layers trained, its gradients to
OUT/GRID-gradients.safetensors."""

import random
import sys
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

LOSS = "megatron_r1.controller.algorithms.grpo:loss"
SETTINGS = LossSettings(loss_average="token", clip_low=0.2, clip_high=0.2)
MAX_RESPONSE = 64
"""rollout.max_response_tokens, which MTP losses are divided by."""


def config(model: str, grid: str, mtp: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32", "mtp": mtp},
            "rollout": {"max_response_tokens": MAX_RESPONSE},
            # No clipping, as the norm includes the MTP layers' gradients.
            "optimizer": {"learning_rate": 0.1, "epsilon": 1.0, "clip_grad": 1e9},
            "parallel": {**parallel_settings(grid, mtp != "none"), "threads": 1},
        }
    )


def samples(model: str) -> list[Sample]:
    draw = random.Random(1)
    sequences = torch.load(Path(model).parent / "sequences.pt")
    made = []
    for ids in sequences:
        first, *rest = ids[0].tolist()
        logprobs = [-draw.uniform(3, 6) for _ in rest]
        made.append(Sample.pack([first], rest, logprobs, draw.uniform(-2, 2)))
    return made


def update(settings: Config, grid_position, model: str):
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(settings, grid_position)
    made = samples(model)
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])
    trainer.compute_logprobs(1.0, with_reference=False)
    trainer.update(0, LOSS, SETTINGS, 0.1)
    return trainer


def write_gradients(trainer, file: Path) -> None:
    """Export the gradients as if they were the weights."""
    with torch.no_grad():
        for chunk in trainer.model_chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
    weights.write_hf(trainer.model_chunks, trainer.hf_config, file, dtype=torch.float32)


def main() -> None:
    model, out, *grids = sys.argv[1:]
    for grid in grids:
        grid_position = distributed.initialize(config(model, grid, "train").parallel, seed=0)
        from megatron.core import parallel_state

        for mtp in ("none", "frozen", "train"):
            trainer = update(config(model, grid, mtp), grid_position, model)
            file = Path(out) / f"{grid}-{mtp}.safetensors"
            weights.write_hf(trainer.model_chunks, trainer.hf_config, file, dtype=torch.float32)
        write_gradients(trainer, Path(out) / f"{grid}-gradients.safetensors")
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
