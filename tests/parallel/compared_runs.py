"""Runs of the real trainer on these ranks that differ by one planted change:
`compared_runs.py MODEL GRID OUT`.

Each makes `STEPS` updates of the same mini-batches, and writes what a run writes: settings, a line
of metrics a step, and every step's checkpoint. OUT/equal has no change, the others are called as
their entry of PLANTS; OUT/planted.json has the tensor that each changed."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_steps import LOSS, SETTINGS, config, load

from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer import distributed

STEPS = 4
MANTISSA_BIT = 1 << 3
"""A low bit of a float32's mantissa: a relative change of about 1e-6."""


@dataclass(frozen=True)
class Plant:
    """A change of one tensor.

    Attributes:
        step: the step in which it is made.
        rank: the rank that makes it.
        name: a part of the parameter's name on that rank.
        when: "gradient", before the optimizer's step, or "end", after it.
        change: what is done to the tensor.
        of: "weights", "main_grad", or a key of the optimizer's state."""

    step: int
    rank: int
    name: str
    when: str
    change: Callable[[torch.Tensor], None]
    of: str = "weights"


def flip_bit(tensor: torch.Tensor) -> None:
    """Flip a bit of the largest number."""
    flat = tensor.detach().view(-1)
    flat.view(torch.int32)[flat.abs().argmax()] ^= MANTISSA_BIT


def double(tensor: torch.Tensor) -> None:
    tensor.detach().mul_(2.0)


PLANTS = {
    "weight_bit": Plant(2, 1, "self_attention.linear_proj.weight", "end", flip_bit),
    "weight_bit_of_the_last_step": Plant(4, 1, "linear_proj.weight", "end", flip_bit),
    "norm_of_the_first_step": Plant(1, 1, "mlp", "end", double),
    "gradient_tensor": Plant(3, 1, "linear_proj.weight", "gradient", double, "main_grad"),
    "gradient_bit": Plant(2, 1, "mlp", "gradient", flip_bit, "main_grad"),
    "first_moment": Plant(2, 1, "mlp", "end", flip_bit, "exp_avg"),
    "second_moment": Plant(3, 1, "linear_proj.weight", "end", double, "exp_avg_sq"),
    "reference": Plant(3, 1, "linear_proj.weight", "end", flip_bit, "reference"),
    "random_stream": Plant(2, 1, "", "end", lambda tensor: None, "rng"),
}


def plant(trainer, change: Plant, planted: list[str]) -> None:
    if change.of == "rng":
        torch.rand(1)
        return
    name, parameter = next(
        (name, parameter)
        for chunk in trainer.model_chunks
        for name, parameter in chunk.named_parameters()
        if change.name in name and parameter.dim() == 2
    )
    planted.append(name.removeprefix("module."))
    if change.of == "weights":
        change.change(parameter)
    elif change.of == "main_grad":
        change.change(parameter.main_grad)
    elif change.of == "reference":
        with trainer.reference.swapped_in():
            change.change(parameter)
            trainer.reference.refresh()
    else:
        change.change(state_of(trainer.optimizer, parameter)[change.of])


def state_of(optimizer, parameter) -> dict[str, torch.Tensor]:
    """Return the optimizer's state of a model's parameter."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for index, group in enumerate(part.model_float16_groups + part.model_fp32_groups):
            for model, main in zip(
                group,
                (part.shard_fp32_from_float16_groups + part.shard_fp32_groups)[index],
                strict=True,
            ):
                if model is parameter:
                    return part.optimizer.state[main]
    raise LookupError("the parameter has no state on this rank")


def run(settings, grid_position, out: Path, change: Plant | None) -> str | None:
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    torch.manual_seed(1)
    trainer = Trainer(settings, grid_position)
    folders = CheckpointManager(trainer)
    trainer.refresh_reference()
    mine = change if change and change.rank == dist.get_rank() else None
    planted: list[str] = []
    if dist.get_rank() == 0:
        RunFolder(out).path.mkdir(parents=True)
        RunFolder(out).write_config(settings.model_dump())
        RunFolder(out).checkpoints.mkdir()
    dist.barrier()
    step_of_optimizer = trainer.optimizer.step
    for step in range(1, STEPS + 1):
        is_due = mine is not None and mine.step == step

        def stepped(is_due=is_due):
            if is_due and mine.when == "gradient":
                plant(trainer, mine, planted)
            return step_of_optimizer()

        trainer.optimizer.step = stepped
        load(trainer, grid_position, (step,))
        metrics = trainer.update(0, LOSS, SETTINGS, 0.1) | trainer.measure_logprob_diff()
        if is_due and mine.when == "end":
            plant(trainer, mine, planted)
        folders.save_checkpoint(
            str(RunFolder(out).checkpoints / f"step_{step:08d}"), {"step": step}
        )
        assert folders.checkpoint_progress(wait=True)["error"] is None
        # The last stage has all of them.
        if grid_position.is_last_stage and grid_position.tensor_rank == 0:
            RunFolder(out).append_metrics({"step": step, **metrics})
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, planted[:1])
    return next((each[0] for each in everyone if each), None)


def main() -> None:
    model, grid, out = sys.argv[1:]
    settings = config(model, grid)
    grid_position = distributed.initialize(settings.parallel, seed=0)
    planted = {"equal": run(settings, grid_position, Path(out) / "equal", None)}
    planted["equal_again"] = run(settings, grid_position, Path(out) / "equal_again", None)
    for name, change in PLANTS.items():
        planted[name] = run(settings, grid_position, Path(out) / name, change)
    if dist.get_rank() == 0:
        (Path(out) / "planted.json").write_text(json.dumps(planted))
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
