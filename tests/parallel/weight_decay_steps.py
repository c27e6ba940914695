"""An update with weight decay against one without: `weight_decay_steps.py MODEL GRID…`

From the same weights and gradient the two differ by learning rate x decay of every matrix, and
equal each other in norms and biases.
"""

import random
import sys

import torch
from grids import parallel_settings, positions

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
RATE, DECAY = 0.01, 0.5


def config(model: str, grid: str, decay: float) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32", "mtp": "train"},
            "optimizer": {"weight_decay": decay},
            "parallel": {**parallel_settings(grid), "threads": 1},
        }
    )


def updated(model: str, grid: str, decay: float, grid_position) -> tuple[dict, dict]:
    """The weights before and after an update, by name."""
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(config(model, grid, decay), grid_position)
    chunks = enumerate(trainer.model_chunks)
    named = {f"{at}.{name}": p for at, chunk in chunks for name, p in chunk.named_parameters()}
    start = {name: p.detach().clone() for name, p in named.items()}
    draw = random.Random(5)
    made = [Sample.pack([1], [draw.randrange(67) for _ in range(15)]) for _ in range(8)]
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])
    trainer.update(0, LOSS, None, RATE)
    return start, {name: p.detach() for name, p in named.items()}


def main() -> None:
    model, *grids = sys.argv[1:]
    for grid, grid_position in positions(grids, lambda grid: config(model, grid, 0.0).parallel):
        start, plain = updated(model, grid, 0.0, grid_position)
        again, decayed = updated(model, grid, DECAY, grid_position)
        assert any(value.dim() == 1 for value in start.values())
        for name, value in start.items():
            assert torch.equal(value, again[name])
            taken = RATE * DECAY * value if value.dim() > 1 else torch.zeros_like(value)
            torch.testing.assert_close(
                plain[name] - decayed[name],
                taken,
                rtol=1e-3,
                atol=1e-6,
                msg=lambda text, where=(grid, name): f"{where}: {text}",
            )
        print(f"{grid} holds", flush=True)


if __name__ == "__main__":
    main()
