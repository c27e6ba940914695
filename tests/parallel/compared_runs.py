"""Runs of the real trainer on these ranks that differ by one planted change:
`compared_runs.py MODEL GRID OUT`.

Each makes `STEPS` updates of the same mini-batches, and writes what a run writes: settings, a line
of metrics a step, and every step's checkpoint. OUT/equal has no change, the others are called as
their entry of PLANTS."""

import re
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
        rank: the rank that makes it; it holds the tensor in every layout of the test.
        name: the tensor's name in the whole model, with the numbers of its layer and expert.
        when: "gradient", before the optimizer's step, or "end", after it.
        change: what is done to the tensor.
        of: "weights", "untrained" (a weight or buffer without gradient), "main_grad", a key of the
            optimizer's state, "reference" or "rng"."""

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


PROJECTION = "decoder.layers.2.self_attention.linear_proj.weight"
DENSE = "decoder.layers.0.mlp.linear_fc1.weight"
EXPERT = "decoder.layers.3.mlp.experts.local_experts.6.linear_fc2.weight"
PLANTS = {
    "weight_bit": Plant(2, 1, PROJECTION, "end", flip_bit),
    "weight_bit_of_the_last_step": Plant(4, 0, DENSE, "end", flip_bit),
    "tensor_of_the_first_step": Plant(1, 0, "embedding.word_embeddings.weight", "end", double),
    "bit_of_the_mtp_layer": Plant(
        3, 1, "mtp.layers.0.eh_proj.weight", "end", flip_bit, "untrained"
    ),
    "bit_of_an_expert": Plant(2, 1, EXPERT, "end", flip_bit),
    "tensor_of_an_expert": Plant(
        3, 0, "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight", "end", double
    ),
    "router_bias": Plant(
        1, 0, "decoder.layers.1.mlp.router.expert_bias", "end", flip_bit, "untrained"
    ),
    "gradient_tensor": Plant(3, 1, PROJECTION, "gradient", double, "main_grad"),
    "gradient_bit": Plant(2, 0, DENSE, "gradient", flip_bit, "main_grad"),
    "gradient_of_an_expert": Plant(4, 1, EXPERT, "gradient", double, "main_grad"),
    "first_moment": Plant(2, 1, "output_layer.weight", "end", flip_bit, "exp_avg"),
    "second_moment": Plant(3, 0, DENSE, "end", double, "exp_avg_sq"),
    "reference": Plant(3, 1, PROJECTION, "end", flip_bit, "reference"),
    "random_stream": Plant(2, 1, "", "end", lambda tensor: None, "rng"),
}


def named_tensors(trainer) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of this rank by their names in the whole model."""
    found = {}
    for chunk in trainer.model_chunks:
        modules = dict(chunk.named_modules())
        for path, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            name = path
            if expert := re.match(r"(.*)\.experts\.local_experts\.(\d+)", path):
                number = modules[expert[1]].local_expert_indices[int(expert[2])]
                name = f"{expert[1]}.experts.local_experts.{number}{path[expert.end() :]}"
            if layer := re.match(r"(.*decoder\.layers)\.\d+", path):
                number = modules[layer[0]].layer_number - 1
                name = f"{layer[1]}.{number}{name[layer.end() :]}"
            found[name.removeprefix("module.")] = tensor
    return found


def plant(trainer, change: Plant) -> None:
    if change.of == "rng":
        torch.rand(1)
        return
    tensor = named_tensors(trainer)[change.name]
    if change.of in ("weights", "untrained"):
        change.change(tensor)
    elif change.of == "main_grad":
        change.change(tensor.main_grad)
    elif change.of == "reference":
        with trainer.reference.swapped_in():
            change.change(tensor)
            trainer.reference.refresh()
    else:
        change.change(state_of(trainer.optimizer, tensor)[change.of])


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


def run(settings, grid_position, out: Path, change: Plant | None) -> None:
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    torch.manual_seed(1)
    trainer = Trainer(settings, grid_position)
    folders = CheckpointManager(trainer)
    trainer.refresh_reference()
    mine = change if change and change.rank == dist.get_rank() else None
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
                plant(trainer, mine)
            return step_of_optimizer()

        trainer.optimizer.step = stepped
        load(trainer, grid_position, (step,))
        metrics = trainer.update(0, LOSS, SETTINGS, 0.1) | trainer.measure_logprob_diff()
        if is_due and mine.when == "end":
            plant(trainer, mine)
        folders.save_checkpoint(
            str(RunFolder(out).checkpoints / f"step_{step:08d}"), {"step": step}
        )
        assert folders.checkpoint_progress(wait=True)["error"] is None
        # The last stage has all of them.
        if grid_position.is_last_stage and grid_position.tensor_rank == 0:
            RunFolder(out).append_metrics({"step": step, **metrics})


def main() -> None:
    model, grid, out = sys.argv[1:]
    settings = config(model, grid)
    grid_position = distributed.initialize(settings.parallel, seed=0)
    for name, change in {"equal": None, "equal_again": None, **PLANTS}.items():
        run(settings, grid_position, Path(out) / name, change)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
