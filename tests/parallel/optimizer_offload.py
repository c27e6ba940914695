"""An optimizer that is offloaded against one that is not: `optimizer_offload.py MODEL OUT GRID…`

Megatron's HybridDeviceOptimizer, with the fields that a recipe gives it, on CPU processes. Two
updates, and a checkpoint of them from which trainers of every share go on. Fails on the first
expectation that does not hold.
"""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from grids import parallel_settings, positions

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import platform
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
SHARES = (0.0, 0.5, 1.0)


class HostTensor(torch.Tensor):
    """A tensor that says that it is in host memory, and so do those computed from it."""

    is_cuda = False


def pretend_to_have_a_gpu() -> None:
    """Make recipes' offload reach Megatron on a CPU.

    Only while the hybrid optimizer divides the parameters they say that they are on a GPU, and
    their pinned copies that they are not; what it does with either part is its own code."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_r1.trainer import construction, optimizer

    with_gpu = SimpleNamespace(device=platform.device, has_gpu=lambda: True)
    construction.platform = optimizer.platform = with_gpu
    optimizer_config.is_te_min_version = lambda version: True
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide_as_on_a_gpu(self, fraction):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.Tensor, "pin_memory", lambda self: self.as_subclass(HostTensor))
            return divide(self, fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide_as_on_a_gpu


def config(model: str, grid: str, share: float) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "bfloat16"},
            "optimizer": {"clip_grad": 1.0, "weight_decay": 0.1},
            "parallel": {**parallel_settings(grid), "threads": 1, "optimizer_offload": share},
        }
    )


def update(trainer, grid_position, seed: int) -> dict:
    draw = random.Random(seed)
    made = [
        Sample.pack([1], [draw.randrange(67) for _ in range(length - 1)])
        for length in (8, 16, 40, 24, 8, 64, 32, 16)
    ]
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])
    return trainer.update(0, LOSS, None, 1e-3)


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in trainer.model_chunks for p in chunk.parameters()]


def check_places(optimizer, share: float) -> None:
    """Assert that what updates the share of an optimizer's parameters is in host memory, master
    weights and moments, and what updates the others on the trainer's device."""
    found = []
    for parts, device in (
        (optimizer.cpu_optimizers, "cpu"),
        ([optimizer.gpu_optimizer] if optimizer.gpu_optimizer else [], platform.device().type),
    ):
        count = 0
        for part in parts:
            for parameter, state in part.state.items():
                kept = [parameter, state["exp_avg"], state["exp_avg_sq"]]
                assert all(tensor.device.type == device for tensor in kept), (share, device)
                assert all(tensor.dtype == torch.float32 for tensor in kept), (share, device)
                count += parameter.numel()
        found.append(count)
    largest = max(p.numel() for group in optimizer.param_groups for p in group["params"])
    # It takes whole parameters until they are the share.
    assert share * sum(found) <= found[0] <= share * sum(found) + largest, (share, found)


def assert_equal(found: tuple, expected: tuple, where: str) -> None:
    assert found[0] == expected[0], f"{where}: {found[0]}, and {expected[0]} without an offload"
    for got, want in zip(found[1], expected[1], strict=True):
        assert torch.equal(got, want), f"{where}: weights differ by {(got - want).abs().max()}"


def an_offload_changes_nothing(model: str, grid: str, grid_position, out: Path) -> None:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    stopped, continued = [], []
    for share in SHARES:
        trainer = Trainer(config(model, grid, share), grid_position)
        parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        hybrid = [isinstance(part.optimizer, HybridDeviceOptimizer) for part in parts]
        assert hybrid == [share > 0] * len(parts), f"{grid}: {hybrid} of parts with {share}"
        start = weights(trainer)
        metrics = [update(trainer, grid_position, seed) for seed in (1, 2)]
        for part in parts if share else []:
            check_places(part.optimizer, share)
        stopped.append((metrics, weights(trainer)))
        assert not all(map(torch.equal, start, stopped[-1][1])), f"{grid}: nothing was trained"
        folders = CheckpointManager(trainer)
        folders.save_checkpoint(str(out / f"{grid}-{share}"), {})
        assert folders.checkpoint_progress(wait=True)["error"] is None
        continued.append((update(trainer, grid_position, 3), weights(trainer)))
        dist.barrier()
    for share, found, later in zip(SHARES, stopped, continued, strict=True):
        assert_equal(found, stopped[0], f"{grid}, offload {share}")
        assert_equal(later, continued[0], f"{grid}, offload {share}, third update")
    for written, read in ((0.0, 0.5), (0.5, 1.0), (1.0, 0.0)):
        trainer = Trainer(config(model, grid, read), grid_position)
        CheckpointManager(trainer).load_checkpoint(
            str(out / f"{grid}-{written}"), with_reference=False
        )
        found = update(trainer, grid_position, 3), weights(trainer)
        assert_equal(found, continued[0], f"{grid}, from a checkpoint of {written} to {read}")


def main() -> None:
    model, out, *grids = sys.argv[1:]
    platform.prepare_process()  # before Megatron is imported
    pretend_to_have_a_gpu()
    for grid, grid_position in positions(grids, lambda grid: config(model, grid, 0.0).parallel):
        an_offload_changes_nothing(model, grid, grid_position, Path(out))


if __name__ == "__main__":
    main()
